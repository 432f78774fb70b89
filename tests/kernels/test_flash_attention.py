"""FlashAttention without a GPU: what it costs, what it refuses, plain torch where there is no kernel, Hopper's code."""

import math
import os
import platform
import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilib.kernels.flash_attention import backward as flash_attention_backward
from minilib.kernels.flash_attention import cost, flash_attention, materialised_cost, merge, reference
from minilib.kernels.flash_attention import forward as flash_attention_forward
from minilib.kernels.flash_attention.tiles import Problem
from minilib.kernels.workbench import compiled
from tests.kernels.parity.flash_attention import CASES, oracle, packed, varlen_oracle
from tests.kernels.place import Place, assert_close

HERE = Place("cpu", interpret=False)


def random(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 5), (3, 7), (7, 3), (4, 0), (0, 4), (0, 0), (1, 1), (1, 7), (7, 1)])
def test_the_reference_agrees_with_sdpa(q_len, k_len, causal):
    q, k, v = random((2, q_len, 4, 16), (2, k_len, 2, 16), (2, k_len, 2, 16))
    leaves, wide = [x.requires_grad_() for x in (q, k, v)], [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*leaves, causal, return_lse=True)
    expected, expected_lse = oracle(*wide, causal)
    assert torch.equal(out, reference(q, k, v, causal))
    assert_close(out, expected, "fp32")
    assert_close(lse, expected_lse, "fp32")
    (out.square().sum() + lse[lse > -math.inf].sum()).backward()
    loss = expected.square().sum() + expected_lse[expected_lse > -math.inf].sum()
    theirs = torch.autograd.grad(loss, wide, allow_unused=True)
    for x, dx in zip(leaves, theirs, strict=True):
        assert_close(x.grad, torch.zeros_like(x) if dx is None else dx, "fp32")


@pytest.mark.parametrize("case", CASES)
def test_on_a_cpu_it_agrees_with_its_oracle(case):
    """The cases that the kernels pass, too: empty and odd lengths, groups, sequences, strides, all gradients."""
    CASES[case](HERE)


class Largest(TorchDispatchMode):
    """Values of the largest tensor that any operation returns."""

    values = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.values = max([self.values, *(x.numel() for x in tensors)])
        return result


@pytest.mark.parametrize(("q_len", "k_len"), [(600, 600), (300, 900), (900, 300)])
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("varlen", (False, True))
def test_on_a_cpu_no_score_is_stored(q_len, k_len, causal, varlen):
    batch = () if varlen else (1,)
    q, k, v = random((*batch, q_len, 2, 16), (*batch, k_len, 1, 16), (*batch, k_len, 1, 16))
    leaves, options = [x.requires_grad_() for x in (q, k, v)], packed(HERE, [(q_len, k_len)]) if varlen else {}
    found, scores = {}, q_len * k_len  # of one head
    for op in (flash_attention, reference):
        taken = {name: x for name, x in options.items() if op is flash_attention or name.startswith("cu")}
        with Largest() as largest:
            out, lse = op(*leaves, causal, return_lse=True, **taken)
            torch.autograd.grad([out.square().sum() + lse[lse > -math.inf].sum()], leaves)
        found[op] = largest.values
    assert found[flash_attention] <= max(q_len, k_len) * 2 * 16 < scores <= found[reference]


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize(("causal", "q_len"), [(False, 9), (True, 9), (True, 4), (True, 13)])
def test_on_a_cpu_what_is_no_number_goes_where_the_references_goes(causal, q_len, where, value):
    tensors = random((2, q_len, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16))
    tensors[where][1, -2, 1, 3] = value
    (found, lse), (expected, expected_lse) = (
        op(*tensors, causal, return_lse=True) for op in (flash_attention, reference)
    )
    blind = max(0, q_len - 9) if causal else 0  # the reference multiplies what these do not see by 0
    torch.testing.assert_close(found[:, blind:], expected[:, blind:], equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    assert not found[1].isfinite().all() and found[0].isfinite().all()


def test_square_causal_attention_is_torchs_own():
    q, k, v = random(*[(2, 9, 2, 16)] * 3)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(flash_attention(q, k, v), theirs)


@pytest.mark.parametrize("causal", (False, True))
def test_sequences_of_variable_length(causal):
    batch = [(3, 5), (0, 4), (4, 0), (0, 0), (9, 3)]
    q, k, v = random((16, 4, 16), (12, 2, 16), (12, 2, 16))
    out, lse = flash_attention(q, k, v, causal, return_lse=True, **packed(HERE, batch))
    expected, expected_lse = varlen_oracle(*(x.double() for x in (q, k, v)), causal, batch)
    assert_close(out, expected, "fp32")
    assert_close(lse, expected_lse, "fp32")
    none = packed(HERE, [(0, 0)]) | {
        name: torch.zeros(1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")
    }
    assert flash_attention(q[:0], k[:0], v[:0], **none).shape == (0, 4, 16)


@pytest.mark.parametrize("causal", (False, True))
def test_the_reference_passes_gradcheck(causal):
    shapes = random((1, 4, 2, 3), (1, 3, 1, 3), (1, 3, 1, 3), dtype=torch.float64)
    tensors = [x.requires_grad_() for x in shapes]

    def attend(*tensors):
        out, lse = reference(*tensors, causal, return_lse=True)
        return out, lse[lse > -math.inf]

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize(("max_k", "together"), [(1, 64), (4096, 48), (16384, 12), (10**6, 4)])
def test_heads_of_a_group_are_worked_at_together_as_long_as_their_keys_fit_the_l2_cache(max_k, together):
    problem = Problem(2, 32, 8, 128, 9, max_k, 9, max_k, causal=True, scale=1.0, varlen=False)
    assert problem.section(max_k, 2, of=32) == together
    assert problem.section(max_k, 2, of=8) == together // 4


def test_a_merge_of_what_saw_nothing_is_nothing():
    out, lse = torch.zeros(2, 3, 4, 16), torch.full((2, 4, 3), -math.inf)
    full, seen = random((2, 3, 4, 16), (2, 4, 3))
    full, seen, out, lse = (x.requires_grad_() for x in (full, seen, out, lse))
    for a, b in (((out, lse), (full, seen)), ((full, seen), (out, lse))):
        merged, merged_lse = merge(*a, *b)
        assert torch.equal(merged, full) and torch.equal(merged_lse, seen)
    merged, merged_lse = merge(out, lse, out, lse)
    assert not merged.any() and (merged_lse == -math.inf).all()
    (merge(out, lse, full, seen)[0].sum() + merged.sum()).backward()
    assert all(x.grad.isfinite().all() for x in (out, lse, full, seen))


def test_a_merge_keeps_the_dtype_and_passes_gradcheck():
    (half,) = random((3, 2, 16), dtype=torch.bfloat16)
    assert merge(half, torch.zeros(2, 3), half, torch.ones(2, 3))[0].dtype == torch.bfloat16
    tensors = random((3, 2, 4), (2, 3), (3, 2, 4), (2, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(merge, [x.requires_grad_() for x in tensors])
    with pytest.raises(ValueError, match=r"lse \(…, heads, tokens\): out \(3, 2, 16\)"):
        merge(half, torch.zeros(3, 2), half, torch.zeros(3, 2))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 5), (5, 0), (1, 1), (4, 9), (9, 4), (7, 7)])
def test_its_cost_counts_every_visible_pair(q_len, k_len, causal):
    pairs = sum(key <= k_len - q_len + query or not causal for query in range(q_len) for key in range(k_len))
    shape = {"batch": 3, "num_heads": 4, "num_kv_heads": 2, "q_len": q_len, "k_len": k_len, "head_dim": 16}
    q, kv, lse = 3 * q_len * 4 * 16, 3 * k_len * 2 * 16, 3 * q_len * 4
    forward, backward = cost(**shape, causal=causal), cost(**shape, causal=causal, backward=True)
    assert forward.flops == 4 * 16 * 12 * pairs and backward.flops == 10 * 16 * 12 * pairs
    assert forward.bytes == 2 * (2 * q + 2 * kv) + 4 * lse  # q and out, k and v
    assert backward.bytes == 2 * (4 * q + 4 * kv) + 4 * lse  # q, out, dout and dq; k, v, dk and dv
    assert cost(**shape, causal=causal, dtype="fp32").bytes == 4 * (2 * q + 2 * kv + lse)
    stored = 2 * 12 * q_len * k_len
    naive, gradient = materialised_cost(**shape, causal=causal), materialised_cost(**shape, backward=True)
    assert naive.bytes == 2 * (2 * q + 2 * kv) + 4 * stored and naive.flops == 4 * 16 * 12 * q_len * k_len
    assert gradient.bytes == 2 * (3 * q + 4 * kv) + 7 * stored and gradient.flops == 2 * naive.flops


DENSE = {"q": torch.zeros(2, 3, 4, 16), "k": torch.zeros(2, 5, 2, 16), "v": torch.zeros(2, 5, 2, 16)}
PACKED = {"q": torch.zeros(6, 4, 16), "k": torch.zeros(7, 2, 16), "v": torch.zeros(7, 2, 16)}
PACKED |= packed(HERE, [(2, 3), (4, 4)])
INT = partial(torch.tensor, dtype=torch.int32)
MISUSES = [
    (DENSE, {"q": torch.zeros(2, 3, 4, 16, dtype=torch.float64)}, TypeError, "q is torch.float64: convert it"),
    (DENSE, {"v": torch.zeros(2, 5, 2, 16).half()}, TypeError, "q is torch.float32 and v is torch.float16"),
    (DENSE, {"k": [1.0]}, TypeError, "k is list"),
    (
        DENSE,
        {"q": torch.zeros(6, 4, 16)},
        ValueError,
        r"q must be \(batch, tokens, heads, head_dim\) without cu_seqlens",
    ),
    (
        PACKED,
        {"k": torch.zeros(1, 7, 2, 16)},
        ValueError,
        r"k must be \(total tokens, heads, head_dim\) with cu_seqlens",
    ),
    (DENSE, {"q": torch.tensor(0.0)}, ValueError, r"q must be \(batch"),
    (DENSE, {"v": torch.zeros(2, 5, 16, 2).mT}, ValueError, r"v must have stride 1 .* call .contiguous\(\)"),
    (DENSE, {"v": torch.zeros(2, 6, 2, 16)}, ValueError, "k and v must have one shape"),
    (DENSE, {"q": torch.zeros(3, 3, 4, 16)}, ValueError, "with q's head_dim and batch"),
    (DENSE, {"q": torch.zeros(2, 3, 4, 32)}, ValueError, "with q's head_dim and batch"),
    ({name: torch.zeros(1, 1, 1, 80) for name in "qkv"}, {}, ValueError, "one of .16, 32, 64, 128., got 80: pad"),
    (DENSE, {"q": torch.zeros(2, 3, 5, 16)}, ValueError, "multiple of k's, got 5 and 2"),
    (DENSE, {"q": torch.zeros(2, 3, 0, 16)}, ValueError, "multiple of k's, got 0 and 2"),
    (DENSE, {"scale": 0.0}, ValueError, "scale must be a number above 0, got 0.0"),
    (DENSE, {"scale": -1.0}, ValueError, "negate q"),
    (DENSE, {"scale": math.nan}, ValueError, "got nan"),
    (DENSE, {"scale": torch.tensor(1.0)}, ValueError, "scale must be a number"),
    (DENSE, {"max_seqlen_q": 3}, ValueError, "go with cu_seqlens: leave them out"),
    (DENSE, {"interpret": True}, ValueError, "TRITON_INTERPRET=1"),
    (PACKED, {"cu_seqlens_k": None}, ValueError, "go together: give both"),
    (PACKED, {"cu_seqlens_q": None}, ValueError, "go together: give both"),
    (PACKED, {"max_seqlen_q": None}, ValueError, "max_seqlen_q must be a whole number with cu_seqlens, got None"),
    (PACKED, {"max_seqlen_k": 4.0}, ValueError, "max_seqlen_k must be a whole number with cu_seqlens, got 4.0"),
    (PACKED, {"max_seqlen_k": torch.tensor(4)}, ValueError, "max_seqlen_k must be a whole number"),
    (PACKED, {"max_seqlen_q": 3}, ValueError, "max_seqlen_q = 3 is less than the longest sequence"),
    (PACKED, {"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be a whole number"),
    (PACKED, {"cu_seqlens_q": [0, 2, 6]}, TypeError, "cu_seqlens_q must be a tensor of torch.int32, got list"),
    (PACKED, {"cu_seqlens_k": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens_k .* torch.int64: convert"),
    (PACKED, {"cu_seqlens_k": INT([[0, 3, 7]])}, ValueError, r"cu_seqlens_k must be contiguous, \(sequences \+ 1,\)"),
    (PACKED, {"cu_seqlens_q": INT([])}, ValueError, "cu_seqlens_q must be contiguous"),
    (PACKED, {"cu_seqlens_q": INT([0, 9, 2, 9, 6])[::2]}, ValueError, "cu_seqlens_q must be contiguous"),
    (PACKED, {"cu_seqlens_q": INT([0, 2, 4, 6])}, ValueError, "of one length, got 4 and 3"),
    (PACKED, {"cu_seqlens_q": INT([1, 2, 6])}, ValueError, "climb from 0 to the 6 tokens of q, got .1, 2, 6."),
    (PACKED, {"cu_seqlens_k": INT([0, 8, 7])}, ValueError, "climb from 0 to the 7 tokens of k"),
    (PACKED, {"cu_seqlens_k": INT([0, 3, 6])}, ValueError, "climb from 0 to the 7 tokens of k"),
]


@pytest.mark.parametrize(("given", "wrong", "error", "message"), MISUSES)
def test_what_does_not_fit_is_refused_by_name(given, wrong, error, message):
    with pytest.raises(error, match=message):
        flash_attention(**given | wrong)


@pytest.mark.skipif(
    platform.system() != "Linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles on Linux, uninterpreted"
)
def test_on_hopper_keys_come_through_the_copy_engine_and_meet_wgmma():
    dense, packed, _, full, *_ = flash_attention_forward.builds("sm_90")
    _, keys, queries, *_ = flash_attention_backward.builds("sm_90")
    for build, dots, copied in ((dense, 2, "cp.async.bulk.tensor"), (packed, 2, "cp.async.cg"),
                                (keys, 4, "cp.async.cg"), (queries, 3, "cp.async.cg")):  # fmt: skip
        ptx = compiled.compile_for("sm_90", build).asm["ptx"]
        assert ptx.count("wgmma.mma_async") >= dots and copied in ptx, build.name
        assert not re.search(r"\bmma\.sync", ptx), build.name
    assert "mma" not in compiled.compile_for("sm_90", full).asm["ptx"]  # fp32 is multiplied as fp32, never as TF32
