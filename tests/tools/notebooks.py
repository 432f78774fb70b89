"""A small exercise for the tests of the tools: two tasks, each with visible and hidden tests."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOUBLE = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x  # the whole secret\n    ### END SOLUTION"
TRIPLE = "def triple(x):\n    ### BEGIN SOLUTION\n    return 3 * x  # another secret\n    ### END SOLUTION"


def checks_of(name: str, factor: int) -> str:
    return (
        f'assert {name}(1) == {factor}, "{name}(1) is {factor}"\n'
        "### BEGIN HIDDEN TESTS\n"
        f'assert {name}(-5) == {-5 * factor}, "negative numbers count as well"\n'
        "### END HIDDEN TESTS"
    )


def cell(grade_id: str, source: str, points: int | None = None, id: str = "", **changes) -> nbformat.NotebookNode:
    graded = points is not None
    settings = {
        "grade": graded,
        "grade_id": grade_id,
        "locked": graded,
        "schema_version": 3,
        "solution": not graded,
        "task": False,
    }
    if graded:
        settings["points"] = points
    return new_code_cell(source, id=id or grade_id, metadata={"nbgrader": settings | changes})


def source_cells() -> list[nbformat.NotebookNode]:
    return [
        new_markdown_cell("# A small exercise", id="intro"),
        cell("task_1", DOUBLE),
        cell("test_1", checks_of("double", 2), 2),
        cell("task_2", TRIPLE),
        cell("test_2", checks_of("triple", 3), 3),
    ]


def write(path: Path, cells: list[nbformat.NotebookNode]) -> Path:
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def make_source(solutions: Path, cells: list[nbformat.NotebookNode] | None = None) -> Path:
    return write(solutions / "small" / "small.ipynb", cells or source_cells())
