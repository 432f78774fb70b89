"""Refuse a source notebook that could not grade, or whose release would give its answers away."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from nbformat import NotebookNode

from tools.grading.cells import HIDDEN, SOLUTION, grade_id, is_answer, is_test, settings_of, split
from tools.grading.dependence import can_fail, silent_asserts

TELLING = 12  # characters; a shorter line of a solution may well stand elsewhere by chance
_MARKER_LIKE = re.compile(r"^\s*#+\s*(begin|end)\s+(solution|hidden|test).*$", re.IGNORECASE | re.MULTILINE)


class BadSource(ValueError):
    """A source notebook that cannot be released; the message says which cell and why."""


class NotReadable(BadSource):
    """It is not a notebook, or nbgrader cannot make an exercise of it."""


class TestsNothing(BadSource):
    """No cell has points."""

    __test__ = False  # not a test, whatever its name suggests to pytest


class DuplicateGradeId(BadSource):
    """Two cells have one name."""


class NotATask(BadSource):
    """An answer without its tests, tests without their answer, or both under names that do not belong together."""


class NoPoints(BadSource):
    """A test cell gives no points, or an answer cell has some."""


class NotLocked(BadSource):
    """A learner could edit the tests."""


class NoSolution(BadSource):
    """An answer cell has no solution region, or nothing in it."""


class StrayRegion(BadSource):
    """A solution or hidden region where none belongs, or one that is not closed or is misspelt."""


class NotPython(BadSource):
    """An answer or its tests are not plain Python."""


class NoVisibleTests(BadSource):
    """A task whose tests are all hidden."""


class NoHiddenTests(BadSource):
    """A task whose tests are all visible."""


class CannotFail(BadSource):
    """Tests that check nothing that depends on the answer."""


class NoMessage(BadSource):
    """An assert that would not say what is wrong."""


class Leak(BadSource):
    """The release contains a line of a solution or of a hidden test."""


def check_source(notebook: NotebookNode) -> None:
    """Refuse a notebook whose grades would mean nothing.

    Raises:
        BadSource: one of its kinds above, with the cell and the reason.
    """
    ids = [grade_id(cell) for cell in notebook.cells if grade_id(cell)]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        raise DuplicateGradeId(f"grade id {name!r} is used more than once")
    if not any(is_test(cell) and settings_of(cell).get("points", 0) > 0 for cell in notebook.cells):
        raise TestsNothing("it tests nothing: no cell has points")
    for index, cell in enumerate(notebook.cells):
        _check_regions(cell, grade_id(cell) or f"cell number {index + 1}")
    for answer, tests, given in _tasks(notebook):
        _check_answer(answer)
        _check_tests(tests, answer, given)


def check_leaks(source: NotebookNode, released: NotebookNode) -> None:
    """Refuse a release that contains a line of a solution or of a hidden test which the source does not show as well.

    Raises:
        Leak: naming the line.
    """
    secret, visible = set(), []
    for cell in source.cells:
        shown, hidden = split(cell.source, HIDDEN)
        shown, solution = split(shown, SOLUTION)
        visible.append(shown)
        secret |= {line.strip() for line in [*hidden.splitlines(), *solution.splitlines()]}
    text = "\n".join(_strings(released))
    for line in sorted(secret):
        if len(line) >= TELLING and line in text and not any(line in shown for shown in visible):
            raise Leak(f"the release would give away: {line}")
    if marker := _MARKER_LIKE.search(text):
        raise Leak(f"the release would show a marker that nbgrader did not take for one: {marker[0].strip()}")


def _tasks(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, NotebookNode, list[NotebookNode]]]:
    """Each answer with its tests and the code cells given before them."""
    answer, given = None, []
    for cell in notebook.cells:
        name = grade_id(cell)
        if is_test(cell):
            if answer is None or name != grade_id(answer).replace("task", "test", 1):
                raise NotATask(f"{name}: tests without their answer; test_1 must follow task_1")
            yield answer, cell, given
            answer = None
        elif is_answer(cell):
            if answer is not None or not name.startswith("task"):
                raise NotATask(f"{grade_id(answer or cell)}: an answer without its tests; test_1 must follow task_1")
            answer = cell
        elif cell.cell_type == "code":
            given.append(cell)
    if answer is not None:
        raise NotATask(f"{grade_id(answer)}: an answer without its tests; test_1 must follow task_1")


def _check_regions(cell: NotebookNode, name: str) -> None:
    for region, belongs, where in ((SOLUTION, is_answer, "an answer"), (HIDDEN, is_test, "a test")):
        try:
            split(cell.source, region)
        except ValueError as error:
            raise StrayRegion(f"{name}: {error}") from error
        if region[0] in cell.source and not belongs(cell):
            raise StrayRegion(f"{name}: {region[0]!r}, but this is not {where} cell")
    for marker in _MARKER_LIKE.finditer(cell.source):
        if not any(exact in marker[0] for exact in (*SOLUTION, *HIDDEN)):
            raise StrayRegion(f"{name}: nbgrader does not know the marker {marker[0].strip()!r}")


def _check_answer(cell: NotebookNode) -> None:
    if settings_of(cell).get("points"):
        raise NoPoints(f"{grade_id(cell)}: an answer cell has no points; its test cell has them")
    if not split(cell.source, SOLUTION)[1].strip():
        raise NoSolution(f"{grade_id(cell)}: nothing between ### {SOLUTION[0]} and ### {SOLUTION[1]}")


def _check_tests(cell: NotebookNode, answer: NotebookNode, given: list[NotebookNode]) -> None:
    name = grade_id(cell)
    if not settings_of(cell).get("points", 0) > 0:
        raise NoPoints(f"{name}: a test cell without points")
    if not settings_of(cell).get("locked"):
        raise NotLocked(f"{name}: a test cell that the learner can edit; lock it")
    visible, hidden = split(cell.source, HIDDEN)
    if not visible.strip():
        raise NoVisibleTests(f"{name}: no visible tests; learners need some before ### {HIDDEN[0]}")
    if not hidden.strip():
        raise NoHiddenTests(f"{name}: no tests between ### {HIDDEN[0]} and ### {HIDDEN[1]}")
    code = _parse(answer.source, grade_id(answer))
    context = ast.Module([statement for other in given for statement in _body(other)], [])
    for what, text in (("visible", visible), ("hidden", hidden)):
        tests = _parse(text, name)
        if not can_fail(tests, code, context):
            raise CannotFail(f"{name}: its {what} tests cannot fail; assert something that depends on the answer")
        for silent in silent_asserts(tests):
            raise NoMessage(f"{name}: no message in its {what} `{ast.unparse(silent)}`; say what is wrong")
        context.body += tests.body


def _body(cell: NotebookNode) -> list[ast.stmt]:
    """The statements of a cell that may hold more than Python, such as %matplotlib; then it helps no test."""
    try:
        return ast.parse(cell.source).body
    except SyntaxError:
        return []


def _parse(text: str, name: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise NotPython(f"{name}: not plain Python: {error.msg}: {(error.text or '').strip()}") from error


def _strings(node: object) -> Iterator[str]:
    """Every string in a notebook: sources, outputs, metadata, attachments."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (text for value in node.values() for text in _strings(value))
    elif isinstance(node, list):
        yield from (text for value in node for text in _strings(value))
