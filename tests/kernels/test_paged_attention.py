"""Paged attention without a GPU: its oracle held to SDPA, what it refuses, and compiled ahead of time.

The kernel itself is interpreted in tests/interpreter/test_paged_attention.py.
"""

import math
import os
import platform
import re

import pytest
import torch

from minilib.kernels.paged_attention import attention as kernel
from minilib.kernels.paged_attention import tiles
from minilib.kernels.workbench import compiled
from tests.kernels.paged_attention_cases import BATCHES, TOLERANCE, make_case
from tests.kernels.place import DTYPES, distance

pytest.importorskip("triton", reason="Triton is for Linux")
compiles = pytest.mark.skipif(
    platform.system() != "Linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles on Linux, uninterpreted"
)


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
        ({"split_keys": 0}, "keys above 0, or None, got 0"),
        ({"split_keys": -64}, "got -64"),
        ({"split_keys": 1.5}, "got 1.5"),
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


@pytest.mark.parametrize(
    ("capacity", "tiles", "short", "partial_bytes", "splits"),
    [
        (32_768, 64 * 8, True, 2**20, 32),  # 64 sequences fill an H200 were they alike; one of 32k is split nonetheless
        (1024, 64 * 8, True, 2**20, 1),
        (32_768, 1 * 8, True, 2**14, 64),  # one sequence alone: programs for every multiprocessor
        (4096, 4 * 8, True, 2**16, 16),
        (4096, 66 * 8, False, 2**26, 1),  # prefill that fills the GPU
        (4096, 11 * 8, False, 2**20, 6),
        (32_768, 4096, True, 2**26, 1),  # partial results would take too much memory
        (131_072, 8, True, 2**10, 64),
        (0, 8, True, 0, 0),
    ],
)
def test_keys_are_split_by_a_size_that_no_other_sequence_changes(capacity, tiles, short, partial_bytes, splits):
    keys = kernel.choose_split(capacity, tiles, 132, short, partial_bytes)
    assert math.ceil(capacity / keys) == splits


BUILDS = {(target, build.name): build for target in compiled.TARGETS for build in kernel.builds(target)}


@compiles
@pytest.mark.parametrize(("target", "name"), [pair for pair in BUILDS if not pair[1].startswith("merge")])
def test_attend_compiles_as_it_was_meant(target, name):
    """Beside what test_compiled.py asks of every kernel: wide addresses, and loads that are really on their way."""
    build = BUILDS[target, name]
    binary, keys, dtype = compiled.compile_for(target, build), build.constants["BLOCK_N"], build.types["q_ptr"][1:]
    report = compiled.read_report(target, name, binary)
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
        assert 65536 // (report.registers * 128) >= tiles.PROGRAMS_PER_SM
        assert 228 * 1024 // (report.shared + 1024) == tiles.PROGRAMS_PER_SM
