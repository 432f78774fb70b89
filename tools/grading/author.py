"""Write a source notebook from code: cells with nbgrader's settings, under ids that never change.

    notebook = author.notebook(
        author.text("text_1", "## 1. Double it (2 points)"),
        author.task("task_1", "def double(x):\\n    ### BEGIN SOLUTION\\n    return 2 * x\\n    ### END SOLUTION"),
        author.tests(
            "test_1",
            points=2,
            visible='assert double(1) == 2, "double(1) is 2"',
            hidden='assert double(-5) == -10, "negative numbers count as well"',
        ),
    )
    author.save(notebook, "99_example")

What the cells must hold is described in tools/release.py.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.grading.cells import HIDDEN
from tools.grading.course import SOLUTIONS


def text(grade_id: str, source: str) -> NotebookNode:
    """A locked markdown cell."""
    return new_markdown_cell(source, id=grade_id, metadata={"nbgrader": _settings(grade_id, locked=True)})


def given(grade_id: str, source: str) -> NotebookNode:
    """A locked code cell: what a task starts from."""
    return new_code_cell(source, id=grade_id, metadata={"nbgrader": _settings(grade_id, locked=True)})


def task(grade_id: str, source: str) -> NotebookNode:
    """An answer cell.

    Args:
        grade_id: such as "task_1".
        source: the code, with the answer between ### BEGIN SOLUTION and ### END SOLUTION.
    """
    return new_code_cell(source, id=grade_id, metadata={"nbgrader": _settings(grade_id, solution=True)})


def tests(grade_id: str, points: int, visible: str, hidden: str) -> NotebookNode:
    """The test cell of the task above it.

    Args:
        grade_id: the task's, with "test" for "task", such as "test_1".
        points: for passing all of it.
        visible: asserts that the learner sees, each with a message that teaches.
        hidden: asserts that only the grader sees, with messages, too.
    """
    source = f"{visible.strip()}\n### {HIDDEN[0]}\n{hidden.strip()}\n### {HIDDEN[1]}"
    settings = _settings(grade_id, locked=True, grade=True) | {"points": points}
    return new_code_cell(source, id=grade_id, metadata={"nbgrader": settings})


tests.__test__ = False  # not a test, whatever its name suggests to pytest


def notebook(*cells: NotebookNode) -> NotebookNode:
    """A notebook of these cells for the Python kernel."""
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return new_notebook(cells=list(cells), metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def save(source: NotebookNode, name: str, solutions: Path = SOLUTIONS) -> Path:
    """Write a notebook to solutions/NAME/NAME.ipynb; return the path."""
    path = solutions / name / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(source, path)
    return path


def _settings(grade_id: str, locked: bool = False, solution: bool = False, grade: bool = False) -> dict:
    return {
        "grade": grade,
        "grade_id": grade_id,
        "locked": locked,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
