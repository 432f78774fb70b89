"""A learner's notebook, read once and made fit for nbgrader in memory; the file itself is never written."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.grading.cells import by_grade_id, grade_id, is_answer, is_test, settings_of
from tools.grading.course import exercises


class CannotGrade(RuntimeError):
    """The notebook could not be graded; the message says why and what to do."""


@dataclass
class Submission:
    """What is handed to nbgrader.

    Args:
        notebook: the learner's cells, with nbgrader's settings as the exercise has them.
        missing: grade ids of test and answer cells that the learner's notebook no longer has.
        left_out: index of a cell that must not run again → what it did.
    """

    notebook: NotebookNode
    missing: set[str]
    left_out: dict[int, str] = field(default_factory=dict)

    def leave_out(self, index: int, reason: str) -> None:
        """Make a cell stop at its first line; for a test cell, the answer that it calls.

        Raises:
            CannotGrade: if that was tried already, or the cell is not the learner's.
        """
        cell = self.notebook.cells[index]
        what = f"{named(cell, index)} {reason}"
        if is_test(cell):
            index = self._answer_before(index)
        cell = self.notebook.cells[index]
        if index in self.left_out or settings_of(cell).get("locked"):
            raise CannotGrade(f"{what}; nothing more can be graded")
        self.left_out[index] = what
        cell.source = f"raise RuntimeError({'not run again: ' + what!r})\n{cell.source}"

    def reasons(self) -> dict[str, str]:
        """Grade id of each answer cell that was left out → what it did."""
        return {grade_id(self.notebook.cells[index]): reason for index, reason in self.left_out.items()}

    def _answer_before(self, index: int) -> int:
        answers = [i for i, cell in enumerate(self.notebook.cells[:index]) if is_answer(cell)]
        return answers[-1] if answers else index


def read(path: Path, shown: str) -> NotebookNode:
    """Read a learner's notebook.

    Args:
        path: the file.
        shown: how to name it in messages.

    Raises:
        CannotGrade: if there is no such file, or it is not a notebook.
    """
    if not path.is_file():
        raise CannotGrade(f"there is no file {shown}; pass the notebook with NB=path/to/notebook.ipynb")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a byte order mark
    except ValueError as error:
        raise CannotGrade(f"{shown} is not a notebook: it is not JSON ({error})") from error
    except OSError as error:
        raise CannotGrade(f"{shown} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict) or not ("cells" in content or "worksheets" in content):
        raise CannotGrade(f"{shown} is JSON, but not a notebook: it has no cells")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cell ids, which are mended here
            notebook = nbformat.reads(json.dumps(content), as_version=4)
            _, notebook = nbformat.validator.normalize(notebook)
            nbformat.validate(notebook)
    except Exception as error:  # nbformat fails in many ways on what only looks like a notebook
        raise CannotGrade(f"{shown} is not a valid notebook: {str(error).splitlines()[0]}") from error
    return notebook


def prepare(learner: NotebookNode, released: NotebookNode) -> Submission:
    """Give the learner's cells the settings that the exercise gave them, whatever has become of those since.

    nbgrader refuses a whole notebook for one copied, renamed or added cell. Here a copy counts as an ordinary cell
    (the last one is graded), and so does a cell whose name the exercise does not know.
    """
    notebook = deepcopy(learner)
    wanted, last = by_grade_id(released.cells), by_grade_id(notebook.cells)
    for cell in notebook.cells:
        name = grade_id(cell)
        cell.metadata.pop("nbgrader", None)
        if name in wanted and cell is last[name]:
            cell.metadata.nbgrader = deepcopy(wanted[name].metadata.nbgrader)
    graded = {name for name, cell in wanted.items() if is_test(cell) or is_answer(cell)}
    return Submission(notebook, graded - set(last))


def check_exercise(name: str, released: NotebookNode, learner: NotebookNode, solutions: Path) -> None:
    """Refuse the notebook of another exercise, whose cells may well have the same names.

    Raises:
        CannotGrade: if none of the cells that the exercise gave is there as it was given.
    """
    given = _given(released)
    there = {cell.source.strip() for cell in learner.cells}
    if given & there or (not given and by_grade_id(released.cells).keys() & by_grade_id(learner.cells).keys()):
        return
    for other in exercises(solutions):
        source = nbformat.read(solutions / other / f"{other}.ipynb", as_version=4)
        if other != name and _given(source) & there:
            raise CannotGrade(f"this is the notebook of {other}, not of {name}")
    raise CannotGrade(f"it has none of the cells of {name}: is it another notebook?")


def named(cell: NotebookNode, index: int) -> str:
    """A cell in words: by its name, or by its place and first line."""
    if grade_id(cell):
        return f"cell {grade_id(cell)}"
    first = (cell.source.strip().splitlines() or [""])[0]
    return f"cell number {index + 1} ({first[:60]!r})"


def _given(notebook: NotebookNode) -> set[str]:
    """Sources of the cells that a learner reads but does not edit, tests aside."""
    return {cell.source.strip() for cell in notebook.cells if settings_of(cell).get("locked") and not is_test(cell)}
