"""A lint for Triton kernels: what the interpreter hides or forgives, and a GPU does not.

Four rules: "scalar method", "masked load", "dot precision" and "64-bit offset"; `RULES` says each in words.

It reads source, follows assignments from line to line, loops twice, and knows no types. So it cannot see: what a
helper that other kernels call does with its parameters, or returns; program numbers that come out of memory; offsets
that grow in a loop with no program number in them; a product taken inside another function; lengths computed from
parameters by anything but a product; and kernels that are not in a file or cell under a decorator that ends in "jit".
Of two branches it believes the last. `tl.dot` must always name its input_precision, as its operands may be fp32.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RULES = {
    "scalar method": "a scalar argument may be a plain number, which has no methods: use tl.cast or a tensor",
    "masked load": "what a masked tl.load gives where nothing is loaded is undefined: say other=",
    "dot precision": "tl.dot multiplies fp32 as TF32 unless told not to: say input_precision=",
    "64-bit offset": "a program's number times a stride or length passes 2³¹: take .to(tl.int64) first",
}


@dataclass(frozen=True, order=True)
class Finding:
    """A line that breaks a rule: which source, line in it, kernel and rule."""

    source: str
    line: int
    kernel: str
    rule: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}, {self.kernel}: {self.rule}: {RULES[self.rule]}"


def lint(sources: Mapping[str, str]) -> list[Finding]:
    """Findings in every kernel of these sources (name → Python text), which may call each other's kernels."""
    kernels = [(name, node) for name, text in sources.items() for node in ast.walk(ast.parse(text)) if is_kernel(node)]
    calls = [call for _, kernel in kernels for call in ast.walk(kernel) if isinstance(call, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    found: set[Finding] = set()
    for source, kernel in kernels:
        reader = _Reader(kernel, launched=kernel.name not in called)
        reader.read(kernel.body)
        found |= {Finding(source, line, kernel.name, rule) for line, rule in reader.found}
    return sorted(found)


def is_kernel(node: ast.AST) -> bool:
    """True for a function under `jit`, `triton.jit`, `triton.jit(...)`, or another name that ends so."""
    if not isinstance(node, ast.FunctionDef):
        return False
    names = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list)
    return any(ast.unparse(name).endswith("jit") for name in names)


class _Reader:
    """Reads one kernel from its first line to its last.

    A value is "program" if it comes from a program's number in 32 bits, "wide" if it has 64 bits, "length" if it is a
    scalar argument or a product of them, and None if nothing is known of it.
    """

    def __init__(self, kernel: ast.FunctionDef, launched: bool):
        parameters = [
            a.arg for a in kernel.args.args if not a.annotation or "constexpr" not in ast.unparse(a.annotation)
        ]
        self.scalars = {name for name in parameters if not name.endswith("_ptr")} if launched else set()
        self.values: dict[str, str | None] = dict.fromkeys(self.scalars, "length")
        self.found: set[tuple[int, str]] = set()

    def read(self, statements: Iterable[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self.bind(target, node.value)
            elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value:
                value = ast.BinOp(node.target, node.op, node.value) if isinstance(node, ast.AugAssign) else node.value
                self.bind(node.target, ast.copy_location(value, node))
            elif isinstance(node, ast.For | ast.While):
                if isinstance(node, ast.For):
                    self.bind(node.target, node.iter)
                for _ in "ab":  # what the end of the body assigns, its beginning reads
                    self.evaluate(node.test if isinstance(node, ast.While) else node.iter)
                    self.read(node.body)
            elif isinstance(node, ast.If):
                self.evaluate(node.test)
                self.read(node.body)
                self.read(node.orelse)
            elif isinstance(node, ast.Expr | ast.Return) and node.value:
                self.evaluate(node.value)

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            values = [self.evaluate(element) for element in value.elts]
        else:
            values = [self.evaluate(value)] * len(getattr(target, "elts", "1"))
        for name, kind in zip(getattr(target, "elts", [target]), values, strict=True):
            self.values[ast.unparse(name)] = kind
            self.scalars.discard(ast.unparse(name))

    def evaluate(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.BinOp):
            kinds = {self.evaluate(node.left), self.evaluate(node.right)}
            if isinstance(node.op, ast.Mult):
                if {"program", "length"} <= kinds:
                    self.found.add((node.lineno, "64-bit offset"))
                return _first(kinds, "wide", "program", "length")
            return _first(kinds, "wide", "program")
        kinds = [self.evaluate(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return kinds[0] if isinstance(node, ast.Subscript | ast.UnaryOp) else None

    def call(self, node: ast.Call) -> str | None:
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        kinds = {self.evaluate(argument) for argument in arguments}
        name, options = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        wide = any(ast.unparse(argument).endswith("int64") for argument in arguments)
        if isinstance(node.func, ast.Attribute) and not name.startswith("tl."):
            of = self.evaluate(node.func.value)
            descriptors = node.func.attr in ("load", "store")  # a number has none of these
            if isinstance(node.func.value, ast.Name) and node.func.value.id in self.scalars and not descriptors:
                self.found.add((node.lineno, "scalar method"))
            return "wide" if wide else of
        if name == "tl.load" and (len(node.args) == 2 or "mask" in options) and "other" not in options:
            self.found.add((node.lineno, "masked load"))
        if name == "tl.dot" and "input_precision" not in options:
            self.found.add((node.lineno, "dot precision"))
        if name == "tl.program_id":
            return "program"
        if wide and name in ("tl.cast", "tl.full", "tl.zeros"):
            return "wide"
        passes = ("tl.minimum", "tl.maximum", "tl.where", "tl.range", "range", "tl.cast", "tl.multiple_of")
        return _first(kinds, "wide", "program") if name in passes else None


def _first(kinds: set[str | None], *order: str) -> str | None:
    return next((kind for kind in order if kind in kinds), None)
