"""Make exercises/ from solutions/ with nbgrader, and refuse a source that could not grade or would give itself away.

Usage: python -m tools.release [--check] [NAME ...]     --check changes nothing, and exits 1 if exercises/ is stale

How to write a source notebook, solutions/NN_name/NN_name.ipynb (tools/grading/author.py makes such cells):

* A task is an answer cell (grade id task_1, "solution": true, no points) and, after it, a test cell (grade id test_1,
  "grade": true, locked, with points). Text and code that are given, before, between and after them, are locked as well
  (text_1, given_1). Cell ids equal grade ids, so that they never change. nbgrader's schema_version is 3.
* In the answer cell the solution stands between ### BEGIN SOLUTION and ### END SOLUTION. The learner gets what is
  around it (the signature, the docstring), and `raise NotImplementedError()` in its place. Both cells are plain Python.
* The test cell begins with asserts that the learner sees; then come, between ### BEGIN HIDDEN TESTS and ### END HIDDEN
  TESTS, those that only the grader sees: other numbers, edges, the mistakes that the visible ones let through.
* Every assert has a message that teaches: what was expected and why, never just "wrong". A learner reads the message
  of the first assert that failed, for hidden ones, too. Tests count things; they never read a clock.
* Nothing may be written to stderr by right answers: nbgrader takes a warning for a failure.
* Tasks do not use each other's answers, so that one mistake costs one task.
* tests/graders/NN_name.py lists, for every task, answers that are different but correct, and plausible wrong ones.

A source that breaks these rules is refused with one of the errors in tools/grading/checks.py. Files beside the source
notebook (data) are released with it.

Exit code: 0 if all is well, 1 if --check found something stale, 2 if a source was refused or an exercise holds answers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.grading.cells import grade_id, is_answer
from tools.grading.checks import BadSource, NotReadable, check_leaks, check_source
from tools.grading.course import EXERCISES, ROOT, SOLUTIONS, CourseError, course, exercises

STUB = "raise NotImplementedError()"
_CELL_METADATA = ("nbgrader", "deletable", "editable", "tags")


def main(argv: list[str] | None = None, solutions: Path = SOLUTIONS, target: Path = EXERCISES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if exercises/ is out of date")
    parser.add_argument("names", nargs="*", help="exercises; all of them if left out")
    options = parser.parse_args(argv)
    code = 0
    for name in options.names or exercises(solutions):
        try:
            files = release(name, solutions)
        except (BadSource, FileNotFoundError) as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            code = 2
            continue
        done = _check(name, files, target) if options.check else _write(name, files, target)
        code = max(code, done)
    if options.check and not options.names:
        for orphan in sorted(set(exercises(target)) - set(exercises(solutions))):
            print(f"stale: exercises/{orphan} has no source in solutions/", file=sys.stderr)
            code = max(code, 1)
    return code


def release(name: str, solutions: Path = SOLUTIONS) -> dict[str, bytes]:
    """What learners get for one exercise: file name → content. The same source gives the same bytes.

    Raises:
        BadSource: if the source cannot grade or the release would give it away.
        FileNotFoundError: if there is no such exercise.
    """
    with course(name, solutions) as made:
        source = _read(made.folder / "solutions" / name / f"{name}.ipynb")
        check_source(source)
        try:
            released = made.release()
        except CourseError as error:
            raise NotReadable(f"nbgrader stopped with {error}") from error
        _clean(released)
        check_leaks(source, released)
        folder = made.folder / "exercises" / name
        companions = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".ipynb"
        }
    return {f"{name}.ipynb": (nbformat.writes(released) + "\n").encode()} | companions


def has_answers(path: Path, released: bytes) -> bool:
    """True if somebody has worked in this exercise since it was released: filled in, run or added a cell."""
    if not path.is_file() or path.read_bytes() == released:
        return False
    ids = {cell.id for cell in nbformat.reads(released.decode(), as_version=4).cells}
    for cell in nbformat.read(path, as_version=4).cells:
        filled_in = is_answer(cell) and STUB not in cell.source
        ran = cell.cell_type == "code" and (cell.outputs or cell.execution_count)
        added = not grade_id(cell) and cell.get("id") not in ids and cell.source.strip()
        if filled_in or ran or added:
            return True
    return False


def _check(name: str, files: dict[str, bytes], target: Path) -> int:
    for file, content in files.items():
        path = target / name / file
        if not path.is_file():
            print(f"stale: {_shown(path)} is missing; run `make exercises`", file=sys.stderr)
            return 1
        if path.read_bytes() != content:
            print(f"stale: {_shown(path)}: {_difference(path, content)}", file=sys.stderr)
            return 1
    return 0


def _write(name: str, files: dict[str, bytes], target: Path) -> int:
    notebook = target / name / f"{name}.ipynb"
    if has_answers(notebook, files[notebook.name]):
        print(f"{_shown(notebook)} holds answers: move it away, then run this again", file=sys.stderr)
        return 2
    for file, content in files.items():
        path = target / name / file
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"wrote {_shown(path)}")
    return 0


def _difference(path: Path, content: bytes) -> str:
    """How a file differs from what the source releases, and what to do."""
    mend = "run `make exercises`"
    if path.suffix != ".ipynb":
        return f"its content differs; {mend}"
    if has_answers(path, content):
        return "it holds answers; move it away and " + mend
    wanted = nbformat.reads(content.decode(), as_version=4).cells
    there = nbformat.read(path, as_version=4).cells
    for old, new in zip(there, wanted, strict=False):
        if old != new:
            return f"cell {new.id} differs; {mend}"
    what = "its cells differ in number" if len(there) != len(wanted) else "its metadata or layout differs"
    return f"{what}; {mend}"


def _read(path: Path) -> NotebookNode:
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise NotReadable(f"not a valid notebook: {str(error).splitlines()[0]}") from error
    return notebook


def _clean(notebook: NotebookNode) -> None:
    """Keep what a learner's JupyterLab and nbgrader need, under ids that never change."""
    notebook.nbformat_minor = 5  # the first with cell ids
    notebook.metadata = {
        "kernelspec": notebook.metadata.get("kernelspec", {}),
        "language_info": {"name": notebook.metadata.get("language_info", {}).get("name", "python")},
    }
    for index, cell in enumerate(notebook.cells):
        cell.id = grade_id(cell) or cell.get("id") or f"cell_{index + 1}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in _CELL_METADATA}


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    sys.exit(main())
