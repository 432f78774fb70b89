"""Names and parts of an exercise's cells: which is whose test, what is visible of it, and what is not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nbformat import NotebookNode

SOLUTION = ("BEGIN SOLUTION", "END SOLUTION")
HIDDEN = ("BEGIN HIDDEN TESTS", "END HIDDEN TESTS")
_HEADING = re.compile(r"^#+\s+(.+?)(\s+\(\d+ points?\))?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """One task of an exercise: an answer cell, and the test cell that grades it.

    Args:
        answer: grade id of the answer cell, such as "task_1".
        test: grade id of the test cell, such as "test_1".
        title: the heading above them, without its points.
        most: points that the test cell gives.
    """

    answer: str
    test: str
    title: str
    most: float


def settings_of(cell: NotebookNode) -> NotebookNode:
    """nbgrader's settings of a cell; empty if it has none."""
    return cell.metadata.get("nbgrader", NotebookNode())


def grade_id(cell: NotebookNode) -> str:
    """A cell's name in the gradebook; empty if it has none."""
    return settings_of(cell).get("grade_id", "")


def is_test(cell: NotebookNode) -> bool:
    return bool(settings_of(cell).get("grade"))


def is_answer(cell: NotebookNode) -> bool:
    return bool(settings_of(cell).get("solution")) and not is_test(cell)


def by_grade_id(cells: Iterable[NotebookNode]) -> dict[str, NotebookNode]:
    """Grade id → cell; of several cells with one id, the last."""
    return {grade_id(cell): cell for cell in cells if grade_id(cell)}


def tasks(notebook: NotebookNode) -> list[Task]:
    """The tasks of an exercise, in its order."""
    found, title, answer = [], "", ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := _HEADING.search(cell.source)):
            title = heading[1]
        elif is_answer(cell):
            answer = grade_id(cell)
        elif is_test(cell):
            found.append(Task(answer, grade_id(cell), title, float(settings_of(cell).points)))
    return found


def split(source: str, region: tuple[str, str]) -> tuple[str, str]:
    """A cell's source outside and inside a region, by nbgrader's own rule: a line that contains the marker bounds it.

    Raises:
        ValueError: if a region is opened twice, never closed, or closed without having been opened.
    """
    begin, end = region
    outside, inside, within = [], [], False
    for line in source.splitlines():
        if begin in line or end in line:
            if within == (begin in line):
                raise ValueError(f"{line.strip()!r} {'inside such a region' if within else 'without its beginning'}")
            within = begin in line
        else:
            (inside if within else outside).append(line)
    if within:
        raise ValueError(f"{begin!r} without {end!r}")
    return "\n".join(outside), "\n".join(inside)
