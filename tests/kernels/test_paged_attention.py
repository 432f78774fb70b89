"""Paged attention without a GPU: run by Triton's interpreter, compiled ahead of time, and its oracle held to SDPA.

The interpreter must be chosen before Triton is imported, so one process (this file, run as a script) runs all the cases
and reports how far each is from both oracles; the tests here look at that report.
"""

import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional as F

from minilib.kernels import compiled
from minilib.kernels import paged_attention as kernel

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6, "fp16": 2e-3, "bf16": 1.6e-2}  # of 1 + |value|
B = 64  # keys a round at head_dim 16 in 16 bit, two rounds' worth in 32 bit: lengths around its multiples
BATCHES = {  # (query tokens, tokens in the cache) of each sequence
    "decode": [(1, B - 1), (1, B), (1, B + 1), (1, 2 * B - 1), (1, 2 * B), (1, 2 * B + 1)],
    "prefill": [(9, 9), (2, B - 1), (2, 2 * B)],
    "mixed": [(1, B), (0, 0), (5, B + 1), (0, 5), (1, 2 * B - 1), (1, 1)],
}
PAGE_SIZES = (1, 2, 16, 64)
# Splits take four times as long to interpret: each dtype meets them with two pairs of page size and group.
WITH_SPLITS = {"fp32": ((1, 4), (16, 1)), "fp16": ((2, 4), (64, 1)), "bf16": ((2, 1), (64, 4))}
PRODUCT = list(itertools.product(DTYPES, PAGE_SIZES, (1, 4), BATCHES, (1,)))
PRODUCT += [(dtype, *pair, batch, 3) for dtype in DTYPES for pair in WITH_SPLITS[dtype] for batch in BATCHES]
SPECIAL = {
    "several tall tiles": {"batch": [(70, 75), (66, 66)], "heads": (2, 1), "dtype": "bf16"},
    "group of 7": {"batch": [(1, 40), (5, 9)], "heads": (14, 2), "dtype": "fp16"},
    "group of 20": {"batch": [(1, 40), (2, 9)], "heads": (20, 1), "num_splits": 2},
    "page of 3": {"batch": [(1, 40), (5, 9)], "page_size": 3},
    "head_dim 64": {"batch": [(1, 33), (4, 17)], "head_dim": 64},
    "head_dim 128": {"batch": [(1, 33), (4, 17)], "head_dim": 128, "dtype": "bf16"},
    "head_dim 256": {"batch": [(1, 33), (18, 19)], "head_dim": 256, "dtype": "bf16"},
    "padding after the last sequence": {
        "batch": [(1, 9), (2, 9), (0, 0)],
        "padding": 35,
        "heads": (1, 1),
        "num_splits": 2,
    },
    "more queries than keys": {"batch": [(4, 2), (3, 0)], "num_splits": 2},
    "a scale": {"batch": [(1, 9), (2, 9)], "scale": 1.5},
    "one sequence": {"batch": [(3, 9)], "num_splits": 2},
    "no sequence": {"batch": [], "padding": 3},
    "no token": {"batch": [(0, 5), (0, 0)]},
    "strides": {"batch": [(1, 40), (5, 9)], "strided": True, "heads": (8, 2)},
    "more splits than blocks": {"batch": [(1, 1), (1, 300)], "num_splits": 33, "heads": (1, 1)},
    "splits chosen": {"batch": [(1, 1), (1, 300)]},
}


def make_case(
    batch, heads=(4, 2), head_dim=16, page_size=16, dtype="fp32", padding=0, strided=False, scale=None, seed=0,
    device="cpu",
):  # fmt: skip
    """Arguments of paged_attention, and what SDPA makes of the same keys and values before they went into pages.

    Pages are dealt out in random order. Every page, slot and table entry that no sequence owns is poisoned.
    """
    (num_heads, num_kv_heads), generator = heads, torch.Generator().manual_seed(seed)
    dtype = DTYPES.get(dtype, torch.float64)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    used = [math.ceil(context / page_size) for _, context in batch]
    free = torch.randperm(sum(used) + 3, generator=generator).tolist()
    both = torch.full((len(free), 2, num_kv_heads, page_size, head_dim), math.nan, dtype=dtype)
    k_pages, v_pages = both.unbind(1)
    if not strided:
        k_pages, v_pages = k_pages.contiguous(), v_pages.contiguous()
    tables = torch.full((len(batch), max(used, default=0) + 1), -(2**30), dtype=torch.int32)
    starts = [0, *itertools.accumulate(queries for queries, _ in batch)]
    q = random(starts[-1] + padding, num_heads + 2 * strided, head_dim)[:, :num_heads]
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for i, (queries, context) in enumerate(batch):
        k, v = random(num_kv_heads, context, head_dim), random(num_kv_heads, context, head_dim)
        for j in range(used[i]):
            page, part = free.pop(), slice(j * page_size, (j + 1) * page_size)
            tables[i, j] = page
            k_pages[page, :, : k[:, part].shape[1]] = k[:, part]
            v_pages[page, :, : v[:, part].shape[1]] = v[:, part]
        blind = max(0, queries - context)  # these stand before the first key
        seen = (x.double() for x in (q[starts[i] + blind : starts[i + 1]].transpose(0, 1), k, v))
        mask = torch.ones(queries - blind, context, dtype=torch.bool).tril(context - queries + blind)
        if queries > blind:
            mixed = F.scaled_dot_product_attention(*seen, attn_mask=mask, scale=scale, enable_gqa=True)
            expected[starts[i] + blind : starts[i + 1]] = mixed.transpose(0, 1)
    lens = [torch.tensor(x, dtype=torch.int32) for x in ([context for _, context in batch], starts)]
    return [x.to(device) for x in (q, k_pages, v_pages, tables, *lens)], expected.to(device)


def distance(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """The largest error, as a share of 1 + |value|; infinite where one of the two is not a number."""
    error = (ours.double() - oracle.double()).abs() / (1 + oracle.double().abs())
    return error.nan_to_num(math.inf).max().item() if error.numel() else 0.0


def run_interpreted() -> None:
    """What the script does: every case, and one plain bf16 tl.dot, through the interpreter."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch then poisons what it allocates without a value
    assert torch.empty(3).new_empty(3).isnan().all()
    report = {}
    for dtype, page_size, group, batch, splits in PRODUCT:
        args, expected = make_case(BATCHES[batch], (group, 1), page_size=page_size, dtype=dtype)
        longest = 32 if batch == "prefill" else None  # a hint that asks for the tall tile
        name = f"{dtype}-{page_size}-{group}-{batch}-{splits}"
        report[name] = errors(args, expected, max_q_len=longest, num_splits=splits)
    for name, case in SPECIAL.items():
        case = dict(case)
        options = {key: case[key] for key in ("num_splits", "scale") if key in case}
        case.pop("num_splits", None)
        args, expected = make_case(**case)
        report[name] = errors(args, expected, **options)
    report["bf16 dot"] = canary()
    report["written by one program"] = written_by_one_program()
    sys.stdout.write(json.dumps(report))


def errors(args, expected, **options) -> list:
    """How far the interpreted kernel is from SDPA and from the reference; if it fails, infinitely far, and why."""
    try:
        ours = kernel.paged_attention(*args, **options, interpret=True)
    except Exception as error:  # one case must not take the report of the others along
        return [math.inf, repr(error)]
    return [distance(ours, expected), distance(ours, kernel.reference(*args, scale=options.get("scale")))]


def written_by_one_program() -> list[list[int]]:
    """(token, head) pairs that the first program of the grid writes, of 9 tokens with 7 heads on one kv head.

    The interpreter runs programs one after another: what one writes into another's rows is written over, unseen.
    """
    args, _ = make_case([(9, 9)], (7, 1))

    class First:
        def __getitem__(self, grid):
            return whole[(1, 1, 1)]

    whole, kernel.attend = kernel.attend, First()
    ours = kernel.paged_attention(*args, interpret=True)
    kernel.attend = whole
    return ours.isfinite().all(-1).nonzero().tolist()


def canary() -> bool:
    """Does the interpreter multiply bf16 matrices rightly?"""
    import triton

    left, right = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = torch.zeros(16, 16)
    triton.jit(multiply)[(1,)](left, right, product)
    return distance(product, left.double() @ right.double()) < 1e-2


def multiply(left_ptr, right_ptr, product_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(product_ptr + at, tl.dot(tl.load(left_ptr + at), tl.load(right_ptr + at)))


if __name__ == "__main__":
    import triton.language as tl

    run_interpreted()
    sys.exit()

triton = pytest.importorskip("triton", reason="Triton is for Linux")
compiles = pytest.mark.skipif(
    platform.system() != "Linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles on Linux, uninterpreted"
)


@pytest.fixture(scope="module")
def report():
    triton_version, numpy_version = (tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, numpy))
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 cannot run a loop with NumPy 2.4 or later")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::RuntimeWarning"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_agrees_with_both_oracles(report, dtype, page_size, batch):
    for case in PRODUCT:
        if (case[0], case[1], case[3]) == (dtype, page_size, batch):
            sdpa, reference = report["-".join(map(str, case))]
            assert sdpa < TOLERANCE[dtype] and reference < TOLERANCE[dtype], case


@pytest.mark.parametrize("name", SPECIAL)
def test_the_kernel_agrees_in_odd_cases(report, name):
    (sdpa, reference), tolerance = report[name], TOLERANCE[SPECIAL[name].get("dtype", "fp32")]
    assert sdpa < tolerance and reference < tolerance


def test_the_interpreter_still_cannot_multiply_bf16(report):
    assert not report["bf16 dot"], "mended: take UPCAST out of minilib/kernels/paged_attention.py, and this test"


def test_a_program_writes_its_own_rows_alone(report):
    rows = 16 // 7  # tokens in a tile of 16 rows, for a group of 7
    assert report["written by one program"] == [[token, head] for token in range(rows) for head in range(7)]


@pytest.mark.parametrize("dtype", ("fp64", *DTYPES))
@pytest.mark.parametrize("batch", BATCHES)
def test_the_reference_agrees_with_sdpa(dtype, batch):
    for page_size in (1, 3, 16, 64):
        args, expected = make_case(BATCHES[batch], page_size=page_size, dtype=dtype, padding=2, seed=page_size)
        ours = kernel.reference(*args)
        assert ours.dtype == args[0].dtype and distance(ours, expected) < TOLERANCE[dtype]
        if dtype != "fp64":
            assert torch.equal(kernel.paged_attention(*args), ours)  # what a CPU gets


def test_a_scale_is_a_factor_on_the_scores():
    args, _ = make_case(BATCHES["mixed"], dtype="fp64")
    doubled = kernel.reference(2 * args[0], *args[1:])
    assert distance(kernel.reference(*args, scale=2 * 16**-0.5), doubled) < 1e-12


def test_the_reference_passes_gradients_on():
    args, _ = make_case([(2, 5)], dtype="fp64", page_size=1)
    args[0].requires_grad_()
    torch.autograd.gradcheck(lambda q: kernel.reference(q, *args[1:]), (args[0],))


def test_cost_is_what_a_hand_counts():
    cost = kernel.cost(4, 2, 16, context_lens=[5, 3, 1], q_lens=[2, 0, 1], dtype="bf16", page_size=2)
    pairs = (4 + 5) + 1
    assert cost.flops == 4 * 16 * 4 * pairs
    keys_and_values, queries_and_results, entries = 2 * 2 * 16 * (5 + 1), 2 * 4 * 16 * 3, 3 + 1
    assert cost.bytes == 2 * keys_and_values + 2 * queries_and_results + 4 * entries
    assert (cost.calls, cost.dtype) == (1, "bf16")
    wide = kernel.cost(4, 2, 16, [5, 3, 1], [2, 0, 1], torch.float32, page_size=2)
    assert wide.bytes == 2 * cost.bytes - 4 * entries and wide.dtype == "fp32"


@pytest.mark.parametrize(("context", "queries"), [(1, 1), (7, 1), (7, 3), (7, 7), (7, 0)])
def test_cost_counts_the_pairs_of_the_mask(context, queries):
    mask = torch.ones(queries, context).tril(context - queries)
    assert kernel.cost(1, 1, 16, [context], [queries]).flops == 4 * 16 * mask.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp64"}, "fp32, fp16, bf16, got 'fp64'"),
        ({"q_lens": [1, 6]}, r"from 0 to its context_len, got .*\(5, 6\)"),
        ({"q_lens": [1]}, "zip"),
    ],
)
def test_cost_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        kernel.cost(
            **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "context_lens": [5, 5], "q_lens": [1, 1], **options}
        )


Q, K, V, TABLES, CONTEXTS, STARTS = range(6)
ERRORS = [  # which argument, what is done to it, what the message says
    (Q, lambda x: x.double(), TypeError, "q must be .*float32 or .*float16 or .*bfloat16.*got torch.float64"),
    (Q, lambda x: x.tolist(), TypeError, "q must be a tensor.*got list"),
    (K, lambda x: x.half(), TypeError, "k_pages must be .*float32, got torch.float16"),
    (V, lambda x: x.bfloat16(), TypeError, "v_pages must be .*float32, got torch.bfloat16"),
    (TABLES, lambda x: x.long(), TypeError, "block_tables must be .*int32, got torch.int64"),
    (CONTEXTS, lambda x: x.long(), TypeError, "context_lens must be .*int32"),
    (STARTS, lambda x: x.long(), TypeError, "cu_seqlens_q must be .*int32"),
    (STARTS, lambda x: None, TypeError, "cu_seqlens_q must be a tensor.*NoneType"),
    (Q, lambda x: x[None], ValueError, r"q must have 3 dimensions.*\(1, 3, 4, 16\)"),
    (V, lambda x: x[0], ValueError, "v_pages must have 4 dimensions"),
    (TABLES, lambda x: x[0], ValueError, "block_tables must have 2 dimensions"),
    (Q, lambda x: x.mT.contiguous().mT, ValueError, r"q must have .*stride 1 in the last.*contiguous"),
    (V, lambda x: x.mT.contiguous().mT, ValueError, "v_pages must have .*stride 1"),
    (TABLES, lambda x: x.mT.contiguous().mT, ValueError, "block_tables must have .*stride 1"),
    (CONTEXTS, lambda x: x.repeat_interleave(2)[::2], ValueError, "context_lens must have .*stride 1"),
    (K, lambda x: x.to("meta"), ValueError, "k_pages must .* on cpu, got .* meta"),
    (K, lambda x: x[:, :1], ValueError, "k_pages and v_pages must be .*alike"),
    (V, lambda x: x[:-1], ValueError, "k_pages and v_pages must be .*alike"),
    (Q, lambda x: x[..., :8], ValueError, "with q's head_dim, one of .*: pad with zeros"),
    (Q, lambda x: x[:, :3], ValueError, "q's heads must be 1 to 128 times the pages', got 3, 2"),
    (Q, lambda x: x.repeat(1, 65, 1), ValueError, "got 260, 2"),
    (CONTEXTS, lambda x: x[:1], ValueError, r"n, n, n \+ 1 rows, got \[2, 1, 3\]"),
    (STARTS, lambda x: x[:2], ValueError, r"n, n, n \+ 1 rows, got \[2, 2, 2\]"),
    (STARTS, lambda x: x + 1, ValueError, "climb from 0 to at most num_tokens = 3"),
    (STARTS, lambda x: x.flip(0), ValueError, "climb from 0"),
    (STARTS, lambda x: 2 * x, ValueError, "at most num_tokens = 3"),
    (CONTEXTS, lambda x: x + 99, ValueError, "as hold the 108 tokens"),
    (CONTEXTS, lambda x: -x, ValueError, "as hold the -9 tokens"),
    (TABLES, lambda x: x + 100, ValueError, "pages from 0 to 5"),
    (TABLES, lambda x: x - 100, ValueError, "pages from 0 to 5"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_what_does_not_fit_is_refused_by_name(number):
    at, change, error, message = ERRORS[number]
    args, _ = make_case([(1, 9), (2, 20)])
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        kernel.paged_attention(*args)


@pytest.mark.parametrize(("dtype", "head_dim"), (("bf16", 256), ("fp32", 128)))
def test_a_group_whose_accumulator_would_not_fit_the_registers_is_refused(dtype, head_dim):
    args, _ = make_case([(1, 9)], dtype=dtype, head_dim=head_dim, heads=(64, 1))
    assert kernel.paged_attention(*args).shape == (1, 64, head_dim)
    args[Q] = args[Q].repeat(1, 2, 1)
    with pytest.raises(ValueError, match="1 to 64 times the pages', got 128, 1"):
        kernel.paged_attention(*args)


@pytest.mark.parametrize("head_dim", (8, 24, 512))
def test_a_head_dim_that_no_tile_fits_is_refused(head_dim):
    args, _ = make_case([(1, 9)], head_dim=head_dim)
    with pytest.raises(ValueError, match=rf"one of \(16, 32, 64, 128, 256\).*{head_dim}"):
        kernel.paged_attention(*args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_splits": 0}, "from 1 to 64, or None, got 0"),
        ({"num_splits": 65}, "got 65"),
        ({"num_splits": 1.5}, "got 1.5"),
        pytest.param({"interpret": True}, "TRITON_INTERPRET=1", marks=compiles),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    args, _ = make_case([(1, 9)])
    with pytest.raises(ValueError, match=message):
        kernel.paged_attention(*args, **options)


def test_a_gradient_is_refused_rather_than_lost():
    args, _ = make_case([(1, 9)])
    args[Q].requires_grad_()
    with pytest.raises(ValueError, match="forward only"):
        kernel.paged_attention(*args)
    with torch.no_grad():
        kernel.paged_attention(*args)


BUILDS = {(target, build.name): build for target in compiled.TARGETS for build in kernel.builds(target)}


@compiles
@pytest.mark.parametrize(("target", "name"), [pair for pair in BUILDS if not pair[1].startswith("merge")])
def test_attend_compiles_as_it_was_meant(target, name):
    """Beside what test_compiled.py asks of every kernel: wide addresses, and loads that are really on their way."""
    build = BUILDS[target, name]
    binary, keys, dtype = compiled.compile_for(target, build), build.constants["BLOCK_N"], build.types["q_ptr"][1:]
    report = compiled.read(target, name, binary)
    code = binary.asm["amdgcn" if target == "gfx942" else "ptx"]
    if target == "sm_90" and dtype != "fp32":  # Hopper's wgmma takes 64 rows or more; a decode tile has 16
        assert len(re.findall("wgmma" if build.constants["BLOCK_M"] >= 64 else r"mma\.sync", code)) >= 2
    assert "tf32" not in code and "xf32" not in code  # float32 is multiplied as float32
    # Page number × stride overflows 32 bits beyond 2³¹ elements.
    products = re.findall(rf"arith\.muli.* : tensor<{keys}x(i\d+)>", binary.asm["ttir"])
    assert len(products) >= 4 and set(products) == {"i64"}
    if build.num_stages == 4 and target != "gfx942":
        # Three buffers of keys on their way, and the page lookup is not what the stages went into.
        assert f"memdesc<3x{keys}x{build.constants['HEAD_DIM']}x" in binary.asm["ttgir"]
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", code)
        assert copies and {int(size, 0) for size in copies} == {16}  # 16 bytes each: fully vectorised
    if target == "sm_90" and name == "decode, bf16, head_dim 128, group 4":
        assert 65536 // (report.registers * 128) >= kernel.PROGRAMS_PER_SM
        assert 228 * 1024 // (report.shared + 1024) == kernel.PROGRAMS_PER_SM
