"""Paged attention in Triton's interpreter, against SDPA and against the reference."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from minilib.kernels.paged_attention import attention as kernel
from minilib.kernels.paged_attention.tiles import choose_split
from minilib.kernels.workbench import dispatch
from minilib.kernels.workbench.dispatch import interpreted
from tests.kernels.paged_attention_cases import BATCHES, TOLERANCE, B, make_case
from tests.kernels.place import DTYPES, distance
from tests.kernels.poison import poisoned_outputs

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]
if interpreted():
    import triton
    import triton.language as tl

    def version(module) -> tuple[int, ...]:
        return tuple(map(int, module.__version__.split(".")[:2]))

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytestmark.append(
            pytest.mark.skip("the interpreter of Triton before 3.7 cannot run a loop with NumPy 2.4 or later")
        )

    @triton.jit
    def multiply(left_ptr, right_ptr, product_ptr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(product_ptr + at, tl.dot(tl.load(left_ptr + at), tl.load(right_ptr + at)))


PAGE_SIZES = (1, 2, 16, 64)
# Splits take four times as long to interpret: each dtype meets them with two pairs of page size and group.
WITH_SPLITS = {"fp32": ((1, 4), (16, 1)), "fp16": ((2, 4), (64, 1)), "bf16": ((2, 1), (64, 4))}
PRODUCT = list(itertools.product(DTYPES, PAGE_SIZES, (1, 4), BATCHES, (None,)))
PRODUCT += [(dtype, *pair, batch, B) for dtype in DTYPES for pair in WITH_SPLITS[dtype] for batch in BATCHES]
SPECIAL = {
    "several tall tiles": {"batch": [(70, 75), (66, 66)], "heads": (2, 1), "dtype": "bf16"},
    "group of 7": {"batch": [(1, 40), (5, 9)], "heads": (14, 2), "dtype": "fp16"},
    "group of 20": {"batch": [(1, 40), (2, 9)], "heads": (20, 1), "split_keys": 16},
    "page of 3": {"batch": [(1, 40), (5, 9)], "page_size": 3},
    "head_dim 64": {"batch": [(1, 33), (4, 17)], "head_dim": 64},
    "head_dim 128": {"batch": [(1, 33), (4, 17)], "head_dim": 128, "dtype": "bf16"},
    "head_dim 256": {"batch": [(1, 33), (18, 19)], "head_dim": 256, "dtype": "bf16"},
    "padding after the last sequence": {
        "batch": [(1, 9), (2, 9), (0, 0)],
        "padding": 35,
        "heads": (1, 1),
        "split_keys": 1,
    },
    "more queries than keys": {"batch": [(4, 2), (3, 0)], "split_keys": 1},
    "a scale": {"batch": [(1, 9), (2, 9)], "scale": 1.5},
    "one sequence": {"batch": [(3, 9)], "split_keys": 1},
    "no sequence": {"batch": [], "padding": 3},
    "no token": {"batch": [(0, 5), (0, 0)]},
    "strides": {"batch": [(1, 40), (5, 9)], "strided": True, "heads": (8, 2)},
    "lengths around one split": {"batch": [(1, n) for n in (0, 1, B - 1, B, B + 1) if n], "split_keys": B},
    "lengths around several splits": {"batch": [(1, 3 * B + n) for n in (-1, 0, 1)] + [(0, 0)], "split_keys": B},
    "a split larger than any sequence": {"batch": [(1, 40), (2, 9)], "split_keys": 2**40},
    "very uneven": {"batch": [(1, 1), (1, 1300), (1, 2), (0, 7), (3, 65)], "split_keys": 2 * B},
    "more splits than merge takes": {"batch": [(1, 65 * B + 5), (1, 3)], "split_keys": B, "heads": (1, 1)},
    "uneven and tall": {"batch": [(40, 200), (3, 5), (1, 130)], "split_keys": B, "heads": (1, 1), "dtype": "bf16"},
    "splits chosen": {"batch": [(1, 1), (1, 1300)]},
}


def check(args, expected, tolerance: float, **options) -> None:
    ours = kernel.paged_attention(*args, **options, interpret=True)
    assert distance(ours, expected) < tolerance
    assert distance(ours, kernel.reference(*args, scale=options.get("scale"))) < tolerance


@pytest.mark.parametrize(("dtype", "page_size", "group", "batch", "split_keys"), PRODUCT)
def test_the_kernel_agrees_with_both_oracles(dtype, page_size, group, batch, split_keys):
    args, expected = make_case(BATCHES[batch], (group, 1), page_size=page_size, dtype=dtype)
    longest = 32 if batch == "prefill" else None  # a hint that asks for the tall tile
    check(args, expected, TOLERANCE[dtype], max_q_len=longest, split_keys=split_keys)


@pytest.mark.parametrize("name", SPECIAL)
def test_the_kernel_agrees_in_odd_cases(name):
    case = dict(SPECIAL[name])
    options = {key: case[key] for key in ("split_keys", "scale") if key in case}
    case.pop("split_keys", None)
    check(*make_case(**case), TOLERANCE[case.get("dtype", "fp32")], **options)


@pytest.mark.parametrize(
    ("contexts", "split_keys", "splits"),
    [([300, 10, 10, 10], B, 5), ([B - 1, B, B + 1, 0], B, 2), ([1], B, 1), ([5 * B], 2 * B, 3), ([1300, 1], None, 2)],
)
def test_each_sequence_has_the_programs_that_its_own_length_asks_for(contexts, split_keys, splits, monkeypatch):
    """Others beside it change nothing; programs past its end touch neither keys nor partial results."""
    seen = []

    def watched(function, programs, *arguments, **options):
        dispatch.launch(function, programs, *arguments, **options)
        seen.append((function, programs, arguments))

    monkeypatch.setattr(kernel, "launch", watched)
    args, expected = make_case([(min(1, n), n) for n in contexts], heads=(2, 1), page_size=16)
    with poisoned_outputs():
        check(args, expected, TOLERANCE["fp32"], split_keys=split_keys)
    function, programs, (partial, lse, *_) = seen[0]
    assert function is kernel.attend_pages and programs[2] == splits  # room for the longest, and for a spare page
    if splits == 1:
        assert len(seen) == 1 and not lse.numel()
        return
    size = split_keys or math.ceil(choose_split(args[3].shape[1] * 16, len(contexts), 1, True, 1) / B) * B
    working = (lse > -math.inf).sum((0, 2)) // 2  # of each token's two heads
    assert working.tolist() == [math.ceil(n / size) for n in contexts if n]
    assert partial.isfinite().any(-1).equal(lse > -math.inf)
    assert seen[1][0] is kernel.merge_splits and len(seen) == 2


def test_the_interpreter_still_cannot_multiply_bf16():
    left, right = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = torch.zeros(16, 16)
    multiply[(1,)](left, right, product)
    right_product = distance(product, left.double() @ right.double()) < 1e-2
    assert not right_product, "mended: take UPCAST out of minilib/kernels/paged_attention/attention.py, and this test"


def test_a_program_writes_its_own_rows_alone(monkeypatch):
    """The interpreter runs programs one after another: what one writes into another's rows is written over, unseen."""
    args, _ = make_case([(9, 9)], (7, 1))
    whole = kernel.attend_pages

    class First:
        def __getitem__(self, grid):
            return whole[(1, 1, 1)]

    monkeypatch.setattr(kernel, "attend_pages", First())
    written = kernel.paged_attention(*args, interpret=True).isfinite().all(-1).nonzero().tolist()
    rows = 16 // 7  # tokens in a tile of 16 rows, for a group of 7
    assert written == [[token, head] for token in range(rows) for head in range(7)]
