"""Grade a learner's notebook with nbgrader: points per task, and why points were lost. The notebook is never changed.

Usage: python -m tools.grade --ex 01_numbers [--nb PATH] [--json]

Exit code: 0 for full points, 1 for fewer, 2 if it could not be graded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

from tools.course import ROOT, SOLUTIONS, CourseError, course, test_cells

FEEDBACK = ROOT / "feedback"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class CannotGrade(RuntimeError):
    """The notebook could not be graded; the message says why and what to do."""


@dataclass(frozen=True)
class TaskGrade:
    """Points for one test cell, and the message of the check that failed, if one did."""

    task: str
    points: float
    most: float
    message: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ex", required=True, help="the exercise, such as 01_numbers")
    parser.add_argument("--nb", type=Path, help="the notebook; by default the one in exercises/")
    parser.add_argument("--timeout", type=float, help="seconds that a cell may run (30)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    notebook = options.nb or ROOT / "exercises" / options.ex / f"{options.ex}.ipynb"
    try:
        print(f"grading {_shown(notebook)} …", file=sys.stderr, flush=True)
        grades, html = grade(options.ex, notebook, timeout=options.timeout)
    except CannotGrade as error:
        print(f"not graded: {error}", file=sys.stderr)
        return 2
    FEEDBACK.mkdir(exist_ok=True)
    page = FEEDBACK / f"{options.ex}.html"
    page.write_text(html, encoding="utf-8")
    if options.json:
        print(json.dumps({"notebook": _shown(notebook), "tasks": [asdict(task) for task in grades]}))
    else:
        _report(notebook, grades, page)
    return 0 if all(task.points == task.most for task in grades) else 1


def grade(
    exercise: str, notebook: Path, solutions: Path = SOLUTIONS, timeout: float | None = None
) -> tuple[list[TaskGrade], str]:
    """Grade a copy of a notebook against an exercise's tests, hidden ones included.

    Args:
        exercise: name of the exercise.
        notebook: the learner's file; read, never written.
        solutions: where the sources are.
        timeout: seconds that a cell may run.

    Returns:
        A grade per task in the order of the exercise, and nbgrader's feedback page as HTML.

    Raises:
        CannotGrade: if there is no such exercise or file, it is no notebook, or its kernel died.
    """
    learner = _read(notebook)
    try:
        with course(exercise, solutions, timeout) as made:
            released = nbformat.read(made.release(), as_version=4)
            missing = _missing(released, learner)
            points = made.grade(notebook)
            checked = test_cells(made.graded_notebook())
            grades = [
                TaskGrade(name, *_points(points, cell, name in missing), _why(checked.get(name), name in missing))
                for name, cell in test_cells(released).items()
            ]
            return grades, made.feedback()
    except FileNotFoundError as error:
        raise CannotGrade(str(error)) from error
    except CourseError as error:
        raise CannotGrade(_explain(str(error), notebook)) from error


def _read(notebook: Path) -> nbformat.NotebookNode:
    if not notebook.is_file():
        raise CannotGrade(f"there is no file {_shown(notebook)}; pass the notebook with NB=path/to/notebook.ipynb")
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        if not (isinstance(content, dict) and isinstance(content.get("cells"), list)):
            raise CannotGrade(f"{_shown(notebook)} is JSON, but not a notebook: it has no list of cells")
        return nbformat.reads(json.dumps(content), as_version=4)
    except (ValueError, nbformat.ValidationError) as error:
        raise CannotGrade(f"{_shown(notebook)} is not a notebook ({type(error).__name__})") from error


def _missing(released: nbformat.NotebookNode, learner: nbformat.NotebookNode) -> set[str]:
    """Test cells that the learner's notebook no longer has.

    Raises:
        CannotGrade: if none is left: then it is some other notebook.
    """
    wanted, there = set(test_cells(released)), set(test_cells(learner))
    if not wanted & there:
        raise CannotGrade("it contains none of this exercise's test cells: is it the notebook of another exercise?")
    return wanted - there


def _points(points: dict[str, tuple[float, float]], cell: nbformat.NotebookNode, missing: bool) -> tuple[float, float]:
    if missing or cell.metadata.nbgrader.grade_id not in points:
        return 0.0, float(cell.metadata.nbgrader.points)
    return points[cell.metadata.nbgrader.grade_id]


def _why(cell: nbformat.NotebookNode | None, missing: bool) -> str:
    """What the failed check of a test cell said; empty if none failed."""
    if missing or cell is None:
        return "this test cell was deleted or renamed; copy it back from a fresh exercise"
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            return _message(output.ename, _COLOUR.sub("", output.evalue))
    if cell.execution_count is None:
        return "this test never ran, because the notebook stopped before it"
    return ""


def _message(kind: str, text: str) -> str:
    if kind == "AssertionError":
        return text.strip() or "a check failed"
    if kind == "NotImplementedError":
        return "not answered yet"
    if kind == "KeyboardInterrupt":
        return "took too long and was stopped: is there an endless loop?"
    return f"{kind}: {text.strip()}" if text.strip() else kind


def _explain(error: str, notebook: Path) -> str:
    if "DeadKernel" in error:
        return (
            f"the kernel died while {_shown(notebook)} ran: it called exit, crashed, or used up the memory; "
            "run its cells one by one to see which"
        )
    return f"nbgrader stopped with {error}"


def _report(notebook: Path, grades: list[TaskGrade], page: Path) -> None:
    print(f"\ngraded {_shown(notebook)}\n")
    for task in grades:
        print(f"  {task.task:10} {task.points:g} of {task.most:g}")
        for line in task.message.splitlines():
            print(f"             {line}")
    got, most = sum(task.points for task in grades), sum(task.most for task in grades)
    print(f"\n  {'total':10} {got:g} of {most:g}\n\nfeedback: {_shown(page)}")


def _shown(path: Path) -> str:
    """Relative to where the reader stands, if it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
