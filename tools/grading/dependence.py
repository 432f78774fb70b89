"""Can a test fail? It can if it checks something that depends on the answer. Read from the code, without running it.

The reading is generous: a name depends on the answer as soon as one statement mentions both. What it lets through
(`assert answer() or True`) is found when the graders are graded, with the blank exercise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)


def can_fail(tests: ast.Module, answer: ast.Module, context: ast.Module) -> bool:
    """True if some check that runs depends on the answer.

    Args:
        tests: the tests in question.
        answer: the answer cell.
        context: what ran before the tests, whose names they may use.
    """
    always_true = {node.name for node in answer.body if isinstance(node, _DEFINITIONS)}
    depends = _dependent([*context.body, *tests.body], always_true | _stored(answer))
    checkers = {
        node.name
        for node in [*context.body, *tests.body]
        if isinstance(node, _FUNCTIONS) and any(isinstance(part, (ast.Assert, ast.Raise)) for part in ast.walk(node))
    }
    for statement, branches in _running(tests.body):
        if isinstance(statement, ast.Assert) and _says_something(statement.test, always_true):
            if _names(statement.test) & depends:
                return True
        elif _always_fails(statement):
            if any(_names(branch) & depends for branch in branches):
                return True
        elif any(_names(call) & depends for call in _calls(statement, checkers)):
            return True
    return False


def silent_asserts(tests: ast.Module) -> list[ast.Assert]:
    """Asserts that would fail without a word."""
    return [node for node in ast.walk(tests) if isinstance(node, ast.Assert) and node.msg is None]


def _says_something(test: ast.expr, always_true: set[str]) -> bool:
    """False for what holds (or fails) whatever the answer does: a constant, a tuple, a function's bare name."""
    bare = isinstance(test, ast.Name) and test.id in always_true
    return not bare and not isinstance(test, (ast.Constant, ast.Tuple))


def _always_fails(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and not statement.test.value
    return isinstance(statement, ast.Raise)


def _dependent(code: list[ast.stmt], answer: set[str]) -> set[str]:
    """The answer's names, and every name that a statement could have made with them."""
    depends, known = set(answer), 0
    while len(depends) > known:
        known = len(depends)
        for statement in code:
            if _names(statement) & depends:
                depends |= _stored(statement)
    return depends


def _running(statements: list[ast.stmt], branches: tuple[ast.stmt, ...] = ()) -> Iterator[tuple[ast.stmt, tuple]]:
    """Simple statements that run when the cell does, each with the branches and loops around it."""
    for statement in statements:
        blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        if isinstance(statement, _DEFINITIONS):
            continue
        if any(blocks):
            for block in blocks:
                yield from _running(block, (*branches, statement))
        else:
            yield statement, branches


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _stored(node: ast.AST) -> set[str]:
    """Names that a statement gives a value or changes in place: assigned, defined, or called a method of."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, _DEFINITIONS):
            found.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store):
            found |= _names(part.value)
        elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            found |= _names(part.value.func) if isinstance(part.value.func, ast.Attribute) else set()
    return found


def _calls(statement: ast.stmt, functions: set[str]) -> list[ast.Call]:
    calls = [part for part in ast.walk(statement) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)]
    return [call for call in calls if call.func.id in functions]
