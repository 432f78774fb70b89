"""Make exercises/ from solutions/ with nbgrader, and refuse a source that could not grade or would give itself away.

Usage: python -m tools.release [--check] [NAME ...]     --check only says what is out of date, and exits 1

How to write a source notebook, solutions/NN_name/NN_name.ipynb:

* A task is a solution cell (grade id task_1, no points) followed by a test cell (grade id test_1, locked, with points).
  Everything else the learner should not edit is locked. Cell ids equal grade ids, so that they never change.
* In the solution cell, the answer stands between ### BEGIN SOLUTION and ### END SOLUTION. What is around it (the
  signature, the docstring) is what the learner gets.
* The test cell begins with asserts that the learner sees, each with a message that teaches; then come the hidden ones
  between ### BEGIN HIDDEN TESTS and ### END HIDDEN TESTS. Tests count things; they never read a clock.
* Tasks do not use each other's answers, so that one mistake costs one task.
* tests/graders/NN_name.py lists different-but-correct and plausible wrong answers for every task.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

from tools.course import ROOT, SOLUTIONS, course, exercises

EXERCISES = ROOT / "exercises"
SOLUTION = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)
HIDDEN = re.compile(r"### BEGIN HIDDEN TESTS\n(.*?)### END HIDDEN TESTS", re.DOTALL)
STUB = "raise NotImplementedError()"
TELLING = 12  # characters; a shorter line of a solution may well stand elsewhere by chance


class BadSource(ValueError):
    """A source notebook that cannot be released; the message says which cell and why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if exercises/ is out of date")
    parser.add_argument("names", nargs="*", help="exercises; all of them if left out")
    options = parser.parse_args()
    stale = []
    for name in options.names or exercises():
        try:
            text = release(name)
        except (BadSource, FileNotFoundError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        target = EXERCISES / name / f"{name}.ipynb"
        if target.is_file() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if has_answers(target):
            print(
                f"exercises/{name}/{name}.ipynb has answers in it: move it away, then run this again", file=sys.stderr
            )
            return 2
        if not options.check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            _copy_companions(name)
            print(f"wrote exercises/{name}/{name}.ipynb")
    if options.check and stale:
        print(f"exercises out of date: {', '.join(stale)}; run `make exercises`", file=sys.stderr)
        return 1
    return 0


def release(name: str, solutions: Path = SOLUTIONS) -> str:
    """The learner's notebook for one exercise, as text; the same source gives the same bytes.

    Raises:
        BadSource: if the source cannot grade or the release would give it away.
        FileNotFoundError: if there is no such exercise.
    """
    with course(name, solutions) as made:
        source = nbformat.read(solutions / name / f"{name}.ipynb", as_version=4)
        check_source(source)
        released = nbformat.read(made.release(), as_version=4)
    check_leaks(source, released)
    return nbformat.writes(released) + "\n"


def has_answers(target: Path) -> bool:
    """True if somebody has worked in this exercise: a solution cell no longer holds the stub that it came with."""
    if not target.is_file():
        return False
    cells = nbformat.read(target, as_version=4).cells
    tasks = [cell for cell in cells if cell.metadata.get("nbgrader", {}).get("solution")]
    return any(STUB not in cell.source for cell in tasks)


def check_source(notebook: nbformat.NotebookNode) -> None:
    """Refuse a notebook whose grades would mean nothing.

    Raises:
        BadSource: if it tests nothing, or a task lacks its solution, its visible or its hidden tests.
    """
    cells = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    ids = [cell.metadata.nbgrader.grade_id for cell in cells]
    for grade_id in sorted({i for i in ids if ids.count(i) > 1}):
        raise BadSource(f"grade id {grade_id!r} is used more than once")
    tests = [cell for cell in cells if cell.metadata.nbgrader.grade]
    if not any(cell.metadata.nbgrader.get("points", 0) > 0 for cell in tests):
        raise BadSource("it tests nothing: no cell has points")
    tasks = [cell for cell in cells if cell.metadata.nbgrader.solution]
    if len(tasks) != len(tests):
        raise BadSource(f"{len(tasks)} solution cells but {len(tests)} test cells: each task has one of both")
    for cell in tasks:
        if not SOLUTION.search(cell.source):
            raise BadSource(f"{cell.metadata.nbgrader.grade_id}: a solution cell without ### BEGIN SOLUTION … END")
    for cell in tests:
        _check_tests(cell)


def check_leaks(source: nbformat.NotebookNode, released: nbformat.NotebookNode) -> None:
    """Refuse a release that contains a line of a solution or of a hidden test.

    Raises:
        BadSource: naming the line.
    """
    secret: set[str] = set()
    for cell in source.cells:
        for pattern in (SOLUTION, HIDDEN):
            secret |= {line for block in pattern.findall(cell.source) for line in _lines(block)}
    visible = "\n".join(HIDDEN.sub("", SOLUTION.sub("", cell.source)) for cell in source.cells)
    text = "\n".join(_strings(released.cells))
    leaked = sorted(line for line in secret if line in text and line not in visible)
    if leaked or "### BEGIN" in text:
        raise BadSource(f"the release would give away: {leaked[0] if leaked else 'a marker of a hidden region'}")


def _check_tests(cell: nbformat.NotebookNode) -> None:
    grade_id, settings = cell.metadata.nbgrader.grade_id, cell.metadata.nbgrader
    if not settings.get("points", 0) > 0:
        raise BadSource(f"{grade_id}: a test cell without points")
    if not settings.locked:
        raise BadSource(f"{grade_id}: a test cell that the learner can edit; lock it")
    hidden = "".join(HIDDEN.findall(cell.source))
    for what, code in (("visible", HIDDEN.sub("", cell.source)), ("hidden", hidden)):
        if not any(_can_fail(node) for node in ast.walk(ast.parse(code))):
            raise BadSource(f"{grade_id}: its {what} tests cannot fail; assert something that depends on the answer")


def _can_fail(node: ast.AST) -> bool:
    """An assert whose outcome is not written into it."""
    return isinstance(node, ast.Assert) and any(isinstance(part, ast.Name) for part in ast.walk(node.test))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= TELLING]


def _strings(node: object) -> Iterator[str]:
    """Every string in a notebook: sources, outputs, metadata, attachments."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (text for value in node.values() for text in _strings(value))
    elif isinstance(node, list):
        yield from (text for value in node for text in _strings(value))


def _copy_companions(name: str) -> None:
    """Data files that a source notebook brings along, and nothing that nbgrader makes."""
    for path in (SOLUTIONS / name).iterdir():
        if path.is_file() and path.suffix != ".ipynb":
            shutil.copyfile(path, EXERCISES / name / path.name)


if __name__ == "__main__":
    sys.exit(main())
