"""A throw-away nbgrader course for one exercise: everything nbgrader writes goes into a temporary folder."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps.api import NbGraderAPI
from sqlalchemy.exc import SAWarning
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT / "solutions"
LEARNER = "learner"
_EXCEPTION = re.compile(r"\s*[\w.]+(Error|Exception|Timeout|Interrupt)\b.*")


class CourseError(RuntimeError):
    """nbgrader could not do what it was asked; the message is its own last words."""


class Course:
    """One exercise in a course of its own; made by `course`.

    Args:
        folder: the temporary folder, laid out as nbgrader expects.
        exercise: its name, such as "01_numbers".
        timeout: seconds that a cell may run; nbgrader_config.py says how many if left out.
    """

    def __init__(self, folder: Path, exercise: str, timeout: float | None = None) -> None:
        self.folder = folder
        self.exercise = exercise
        self._api = NbGraderAPI(config=_config(folder, timeout))

    def release(self) -> Path:
        """Make the learner's version from the source, and register its cells and points; return its path."""
        self._do("generate_assignment", self.exercise)
        return self.folder / "exercises" / self.exercise / f"{self.exercise}.ipynb"

    def grade(self, notebook: Path, learner: str = LEARNER) -> dict[str, tuple[float, float]]:
        """Grade a copy of `notebook`; return grade id of each test cell → (points, maximum).

        One course can grade many notebooks, each under another learner's name.

        Raises:
            CourseError: if nbgrader could not grade it, for instance because its kernel died.
        """
        submitted = self.folder / "submitted" / learner / self.exercise
        submitted.mkdir(parents=True)
        shutil.copyfile(notebook, submitted / f"{self.exercise}.ipynb")
        self._do("autograde", self.exercise, learner)
        with Gradebook(f"sqlite:///{self.folder}/gradebook.db") as gradebook:
            try:
                graded = gradebook.find_submission_notebook(self.exercise, self.exercise, learner)
            except MissingEntry as error:
                raise CourseError(f"nbgrader kept no grades: {error}") from error
            return {grade.name: (grade.score, grade.max_score) for grade in graded.grades}

    def graded_notebook(self) -> nbformat.NotebookNode:
        """The learner's notebook as it was executed, hidden tests and error outputs included."""
        path = self.folder / "autograded" / LEARNER / self.exercise / f"{self.exercise}.ipynb"
        return nbformat.read(path, as_version=4)

    def feedback(self) -> str:
        """nbgrader's feedback page for the graded notebook, as HTML."""
        self._do("generate_feedback", self.exercise, LEARNER)
        path = self.folder / "feedback" / LEARNER / self.exercise / f"{self.exercise}.html"
        return path.read_text(encoding="utf-8")

    def _do(self, step: str, *args: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # nbgrader's database session, not the learner's concern
            result = getattr(self._api, step)(*args)
        if not result["success"]:
            raise CourseError(_last_words(result.get("log") or result.get("error") or ""))


@contextmanager
def course(exercise: str, solutions: Path = SOLUTIONS, timeout: float | None = None) -> Iterator[Course]:
    """A course that holds the source of one exercise, gone when the block ends.

    Raises:
        FileNotFoundError: if there is no such exercise; the message lists those there are.
    """
    source = solutions / exercise / f"{exercise}.ipynb"
    if not source.is_file():
        there = ", ".join(exercises(solutions)) or "none yet"
        raise FileNotFoundError(f"there is no exercise {exercise!r}; there are: {there}")
    with tempfile.TemporaryDirectory(prefix="grading-") as name:
        folder = Path(name)
        _put_on_path(Path(sys.executable).parent)
        shutil.copytree(source.parent, folder / "solutions" / exercise)
        yield Course(folder, exercise, timeout)


def exercises(solutions: Path = SOLUTIONS) -> list[str]:
    """Names of all exercises, in reading order."""
    return sorted(path.stem for path in solutions.glob("*/*.ipynb") if path.stem == path.parent.name)


def test_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """The graded cells of a notebook by grade id."""
    return {
        cell.metadata.nbgrader.grade_id: cell
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    }


test_cells.__test__ = False  # not a test, whatever its name suggests to pytest


def _put_on_path(folder: Path) -> None:
    """nbgrader starts `alembic` by its bare name, and a virtual environment need not be on the PATH to be in use."""
    path = os.environ.get("PATH", "").split(os.pathsep)
    if str(folder) not in path:
        os.environ["PATH"] = os.pathsep.join([str(folder), *path])


def _config(folder: Path, timeout: float | None) -> Config:
    """The repository's settings, with the course moved into `folder`."""
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    config.CourseDirectory.root = str(folder)
    config.CourseDirectory.db_url = f"sqlite:///{folder}/gradebook.db"
    config.Exchange.root = str(folder / "exchange")  # not the shared one of a real course on this machine
    if timeout is not None:
        config.Execute.timeout = timeout
    config.NbGrader.log_level = logging.ERROR
    config.NbGraderAPI.log_level = logging.ERROR
    return config


def _last_words(log: str) -> str:
    """The last exception named in nbgrader's log that is not nbgrader's own summary of it."""
    named = [line.strip() for line in log.splitlines() if _EXCEPTION.match(line) and "NbGraderException" not in line]
    return named[-1] if named else (log.strip().splitlines() or ["nbgrader failed without saying why"])[-1]
