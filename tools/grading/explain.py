"""Why a task lost points, in one or two lines: nbgrader keeps the outputs, this reads them."""

from __future__ import annotations

import re

from nbformat import NotebookNode

from tools.grading.cells import Task, by_grade_id, grade_id, is_test, settings_of
from tools.grading.submission import Submission

TIMED_OUT = "CellTimeoutError"  # nbgrader's name for a cell that was stopped
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"Cell In\[(\d+)\], line (\d+)")  # in IPython's tracebacks


def why(task: Task, submission: Submission, graded: NotebookNode, timeout: int, exercise: str) -> str:
    """What cost the task its points.

    Args:
        task: the task that lost points.
        submission: what was handed in.
        graded: the notebook as nbgrader executed it.
        timeout: seconds that a cell might run.
        exercise: name of the exercise, for directions.
    """
    left_out = submission.reasons()
    if task.answer in left_out:
        return left_out[task.answer]
    for name in (task.test, task.answer):
        if name in submission.missing:
            fresh = f"exercises/{exercise}/{exercise}.ipynb"
            return f"cell {name} is missing: it was deleted or renamed; copy it back from a fresh {fresh}"
    cells = by_grade_id(graded.cells)
    for name in (task.answer, task.test):
        error = failure(cells[name])
        if error:
            return _sentence(error, cells[name], graded.cells, timeout)
    if cells[task.test].execution_count is None:
        return "this test never ran"
    return _printed_errors(cells[task.test])


def failure(cell: NotebookNode) -> NotebookNode | None:
    """The error that ended a cell, if one did; of several, the time limit."""
    errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
    return next((error for error in errors if error.ename == TIMED_OUT), errors[0] if errors else None)


def _sentence(error: NotebookNode, cell: NotebookNode, cells: list[NotebookNode], timeout: int) -> str:
    kind, text = error.ename, _COLOUR.sub("", error.evalue).strip()
    place = _place(cell, cells)
    if kind == TIMED_OUT:
        return f"stopped after {timeout} s: is there an endless loop?{place}"
    if kind == "AssertionError":
        own = "an assert of your own failed" if place else f"a check failed: {_line(error, cell)}"
        return (text or own) + place
    if kind == "NotImplementedError" and not text:
        return "not answered yet"
    if kind == "SystemExit":
        return "SystemExit: the code asks Python to end; take the call of exit out" + place
    if kind in ("SyntaxError", "IndentationError", "TabError"):
        text = re.sub(r" \(\d+\.py, line \d+\)$", "", text)  # the name of a file that nobody has
    return (f"{kind}: {text}" if text else kind) + place


def _place(cell: NotebookNode, cells: list[NotebookNode]) -> str:
    """The learner's own line in which it happened, the innermost one; empty if no traceback leads there."""
    numbered = {other.execution_count: other for other in cells if other.cell_type == "code"}
    for number, line in reversed(_FRAME.findall(_traceback(cell))):
        own = numbered.get(int(number))
        if own is not None and not settings_of(own).get("locked"):
            name = f"in {grade_id(own)}, " if grade_id(own) else ""
            return f"\n{name}line {line}: {_source_line(own, int(line))}"
    return ""


def _line(error: NotebookNode, cell: NotebookNode) -> str:
    """The line of the test that failed."""
    frames = _FRAME.findall(_COLOUR.sub("", "\n".join(error.traceback)))
    return _source_line(cell, int(frames[0][1])) if frames and is_test(cell) else "an assert without a message"


def _source_line(cell: NotebookNode, line: int) -> str:
    lines = cell.source.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def _traceback(cell: NotebookNode) -> str:
    lines = [line for output in cell.outputs if output.output_type == "error" for line in output.traceback]
    return _COLOUR.sub("", "\n".join(lines))


def _printed_errors(cell: NotebookNode) -> str:
    """nbgrader takes output to stderr for a failure; a warning is enough."""
    printed = "".join(output.text for output in cell.outputs if output.get("name") == "stderr").strip()
    if not printed:
        return "some checks failed"
    first = re.sub(r"^\S+\.py:\d+: ", "", printed.splitlines()[0])  # a warning begins with the kernel's own file name
    return f"the checks passed, but something was written to stderr, which nbgrader counts as a failure: {first}"
