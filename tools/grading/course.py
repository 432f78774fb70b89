"""A throw-away nbgrader course for one exercise: everything nbgrader writes goes into a temporary folder."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import signal
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Base, Gradebook, MissingEntry
from nbgrader.apps.api import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import SAWarning
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from tools.grading.capped import CappedExecute

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = ROOT / "solutions"
EXERCISES = ROOT / "exercises"
LEARNER = "learner"
_EXCEPTION = re.compile(r"\s*[\w.]+(Error|Exception)\b.*")


class CourseError(RuntimeError):
    """nbgrader could not do what it was asked; the message is its own last words."""


class KernelLost(CourseError):
    """The kernel died while a cell ran, or ran on after its time was up; `Course.running` says which cell."""


class Course:
    """One exercise in a course of its own; made by `course`.

    Args:
        folder: the temporary folder, laid out as nbgrader expects.
        exercise: its name, such as "01_numbers".
        timeout: seconds that a cell may run; nbgrader_config.py says how many if left out.
        on_cell: called with the index of each code cell when it starts.

    Attributes:
        timeout: seconds that a cell may run.
        running: index of the code cell that started last.
        log: what nbgrader logged so far.
    """

    def __init__(
        self,
        folder: Path,
        exercise: str,
        timeout: int | None = None,
        on_cell: Callable[[int], object] = lambda index: None,
    ) -> None:
        self.folder = folder
        self.exercise = exercise
        self.running = 0
        self.log = ""
        self._interrupted = False
        config = settings(folder, timeout)
        config.Execute.on_cell_execute = self._watcher(on_cell)
        steps = Autograde.autograde_preprocessors.default()
        config.Autograde.autograde_preprocessors = [CappedExecute if step is Execute else step for step in steps]
        self.timeout = config.Execute.timeout
        self._api = NbGraderAPI(config=config)

    def release(self) -> NotebookNode:
        """Make the learner's version from the source, register its cells and points, and return it."""
        self._do("generate_assignment", self.exercise)
        return nbformat.read(self.folder / "exercises" / self.exercise / f"{self.exercise}.ipynb", as_version=4)

    def grade(self, notebook: NotebookNode, learner: str = LEARNER) -> dict[str, float]:
        """Grade a notebook; return grade id of each test cell → points.

        One course can grade many notebooks, each under another learner's name; `release` comes first.

        Raises:
            KernelLost: if the notebook killed its kernel or could not be interrupted.
            CourseError: if nbgrader could not grade it for another reason.
        """
        submitted = self.folder / "submitted" / learner / self.exercise
        submitted.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, submitted / f"{self.exercise}.ipynb")
        self._do("autograde", self.exercise, learner)
        with Gradebook(_gradebook(self.folder)) as gradebook:
            try:
                graded = gradebook.find_submission_notebook(self.exercise, self.exercise, learner)
            except MissingEntry as error:
                raise CourseError(f"nbgrader kept no grades: {error}") from error
            return {grade.name: grade.score for grade in graded.grades}

    def graded_notebook(self, learner: str = LEARNER) -> NotebookNode:
        """The learner's notebook as it was executed, hidden tests and error outputs included."""
        path = self.folder / "autograded" / learner / self.exercise / f"{self.exercise}.ipynb"
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
        log = result.get("log") or result.get("error") or ""
        self.log += log
        # nbgrader catches everything that ends one of its steps, Ctrl-C included
        if self._interrupted or result.get("error", "").rstrip().endswith("KeyboardInterrupt"):
            raise KeyboardInterrupt
        if not result["success"]:
            words = _last_words(log)
            lost = "DeadKernelError" in words or "CellTimeoutError" in words
            raise (KernelLost if lost else CourseError)(words)

    def _watcher(self, on_cell: Callable[[int], object]) -> Callable[..., None]:
        """The function that nbclient calls when a cell starts.

        A plain function, not a method: traitlets copies its configuration, and would copy the object along.
        """

        def started(cell: NotebookNode, cell_index: int) -> None:
            self.running = cell_index
            self._stop_on_interrupt()
            on_cell(cell_index)

        return started

    def _stop_on_interrupt(self) -> None:
        """Let Ctrl-C stop the notebook and its kernel. nbclient's own handler cannot be told from a dying kernel."""
        running = asyncio.current_task()

        def stop() -> None:
            self._interrupted = True
            running.cancel()

        with suppress(RuntimeError, ValueError):  # only the main thread may handle signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)


@contextmanager
def course(exercise: str, solutions: Path = SOLUTIONS, **options: object) -> Iterator[Course]:
    """A course that holds the source of one exercise, gone when the block ends.

    Args:
        exercise: name of the exercise.
        solutions: folder of the sources.
        options: `timeout` and `on_cell` of `Course`.

    Raises:
        FileNotFoundError: if there is no such exercise; the message lists those there are.
    """
    if exercise not in exercises(solutions):
        there = ", ".join(exercises(solutions)) or "none yet"
        raise FileNotFoundError(f"there is no exercise {exercise!r}; there are: {there}")
    with tempfile.TemporaryDirectory(prefix="grading-") as name:
        folder = Path(name)
        (folder / "exchange").mkdir()
        leftovers = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
        shutil.copytree(solutions / exercise, folder / "solutions" / exercise, ignore=leftovers)
        with _unsynced():
            _make_gradebook(folder)
            yield Course(folder, exercise, **options)


def exercises(solutions: Path = SOLUTIONS) -> list[str]:
    """Names of all exercises, in reading order."""
    return sorted(path.stem for path in solutions.glob("*/*.ipynb") if path.stem == path.parent.name)


def settings(folder: Path, timeout: int | None = None) -> Config:
    """The repository's nbgrader settings, with the course moved into `folder`."""
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    config.CourseDirectory.root = str(folder)
    config.CourseDirectory.db_url = _gradebook(folder)
    config.Exchange.root = str(folder / "exchange")  # not the shared one of a real course on this machine
    if timeout is not None:
        config.Execute.timeout = timeout
    config.NbGrader.log_level = logging.ERROR
    config.NbGraderAPI.log_level = logging.ERROR
    return config


@contextmanager
def _unsynced() -> Iterator[None]:
    """While the block runs, databases do not wait for the disk at each commit: a gradebook outlives no crash."""

    def connected(connection: sqlite3.Connection, record: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)


def _make_gradebook(folder: Path) -> None:
    """An empty gradebook. nbgrader would take two seconds more, to note a schema version for later upgrades."""
    engine = create_engine(_gradebook(folder))
    Base.metadata.create_all(engine)
    engine.dispose()


def _gradebook(folder: Path) -> str:
    return f"sqlite:///{folder}/gradebook.db"


def _last_words(log: str) -> str:
    """The last exception named in nbgrader's log that is not nbgrader's own summary of it."""
    named = [line.strip() for line in log.splitlines() if _EXCEPTION.match(line) and "NbGraderException" not in line]
    return named[-1] if named else (log.strip().splitlines() or ["nbgrader failed without saying why"])[-1]
