"""No kernel of this project does what the interpreter lets pass; and the lint that says so sees what it should."""

import json

import pytest

from minilib.numbers.records import ROOT
from tools.kernel_lint import Finding, is_kernel, lint

FILES = [*sorted((ROOT / "minilib/kernels").rglob("*.py")), ROOT / "minilib/numbers/probes/chase_kernel.py"]


def cells() -> dict[str, str]:
    """Code cells of every chapter, by file and place; lines of IPython's own are blanked."""
    found = {}
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                own = "".join("\n" if line.startswith(("%", "!")) else line + "\n" for line in lines)
                found[f"{path.name} cell {number}"] = own
    return found


def test_every_kernel_keeps_the_rules():
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
    assert [str(finding) for finding in lint(sources | cells())] == []


def test_kernels_are_found_here():
    import ast

    names = {node.name for path in FILES for node in ast.walk(ast.parse(path.read_text())) if is_kernel(node)}
    assert {"attend_pages", "merge_splits", "forward", "persistent", "walk"} <= names


def rules(body: str, more: str = "", decorator: str = "@triton.jit") -> list[str]:
    """What the lint says of a kernel with this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    head = f"{decorator}\ndef kernel(x_ptr, out_ptr, n, scale, stride_x, BLOCK: tl.constexpr):\n"
    return [finding.rule for finding in lint({"source": head + lines + "\n" + more})]


KEPT = {
    "scalar method": [
        "tl.store(out_ptr, tl.cast(scale, tl.float32))",
        "scale = tl.load(x_ptr) * scale\ntl.store(out_ptr, scale.to(tl.float32))",
        "at = tl.program_id(0).to(tl.int64)",
        "x = x_ptr.to(tl.pointer_type(tl.int8))",
        "x = n.load([0, 0])",  # of a tensor descriptor
    ],
    "masked load": [
        "x = tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < n, other=0.0)",
        "x = tl.load(x_ptr, n > 0, other=0.0)",
        "x = tl.load(x_ptr)",
    ],
    "dot precision": ['x = tl.dot(x, y, x, input_precision="ieee")'],
    "64-bit offset": [
        "row = tl.program_id(0).to(tl.int64)\nx = tl.load(x_ptr + row * stride_x)",
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\nx = x_ptr + row.to(tl.int64)[:, None] * stride_x",
        "x = x_ptr + tl.cast(tl.program_id(0), tl.int64) * n",
        "x = x_ptr + n * (tl.program_id(0) + tl.full((), 0, tl.int64))",
        "row = tl.program_id(0)\nrow = row.to(tl.int64)\nx = x_ptr + row * n",
        "at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        "x = x_ptr + tl.arange(0, BLOCK) * stride_x",
    ],
}
BROKEN = {
    "scalar method": [
        "tl.store(out_ptr, scale.to(tl.float32))",
        "x = tl.load(x_ptr) * n.cast(tl.float32)",
        "n = n.to(tl.int64)",
        "for i in range(n.to(tl.int32)):\n    pass",
        "if scale.to(tl.int32) > 0:\n    return",
    ],
    "masked load": [
        "x = tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < n)",
        "x = tl.load(x_ptr, n > 0)",
        "tl.store(out_ptr, tl.load(x_ptr, mask=n > 0))",
    ],
    "dot precision": ["x = tl.dot(x, y)", "x += tl.dot(x, tl.trans(y), x)"],
    "64-bit offset": [
        "row = tl.program_id(0)\nx = tl.load(x_ptr + row * stride_x)",
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\nx = x_ptr + row[:, None] * stride_x",
        "x = x_ptr + (tl.program_id(0) * n).to(tl.int64)",  # too late
        "x_ptr += stride_x * tl.program_id(0)",
        "x = x_ptr + tl.minimum(tl.program_id(0), n - 1) * stride_x",
        "x, y = x_ptr + tl.program_id(0) % BLOCK * n, 0",
        "x = x_ptr + tl.program_id(0) * (BLOCK * stride_x)",
        "row, last = 0, tl.program_id(0)\nfor _ in range(2):\n    x = x_ptr + row * n\n    row = last",
        "for row in tl.range(tl.program_id(0), 10, tl.num_programs(0)):\n    x = tl.load(x_ptr + row * n)",
        "row = tl.program_id(0)\nif n > 3:\n    tl.store(out_ptr + row * n, 0.0)",
    ],
}


@pytest.mark.parametrize("body", [body for bodies in KEPT.values() for body in bodies])
def test_a_kernel_that_keeps_the_rules_passes(body):
    assert rules(body) == []


@pytest.mark.parametrize(("rule", "body"), [(rule, body) for rule, bodies in BROKEN.items() for body in bodies])
def test_a_kernel_that_breaks_a_rule_is_found(rule, body):
    assert rules(body) == [rule]


@pytest.mark.parametrize("decorator", ["@jit", "@_jit", "@triton.jit(do_not_specialize=['n'])", "@other\n@triton.jit"])
def test_kernels_are_known_by_their_decorator(decorator):
    assert rules("x = tl.dot(x, y)", decorator=decorator) == ["dot precision"]


def test_other_functions_are_left_alone():
    assert rules("x = tl.dot(x, n.to(tl.float32))", decorator="@torch.compile") == []


def test_a_helper_may_be_given_tensors():
    caller = "@jit\ndef caller(x_ptr, n):\n    kernel(x_ptr, x_ptr, tl.load(x_ptr), n, 1, 16)\n"
    assert rules("tl.store(out_ptr, n.to(tl.float32))", more=caller) == []


def test_a_finding_says_where_and_how_to_mend_it():
    finding = Finding("softmax.py", 7, "forward", "masked load")
    assert str(finding).startswith("softmax.py:7, forward: masked load: ") and str(finding).endswith("say other=")
