"""FlashAttention: lengths around blocks, groups, sequences of variable length, strides, all gradients, merging."""

import itertools
import math
from functools import partial

import torch
from torch.nn import functional as F

from minilib.kernels import flash_attention as op
from minilib.kernels.flash_attention.backward import choose_tiles
from minilib.kernels.flash_attention.forward import choose_tile
from tests.kernels.place import DTYPES, Place, assert_close

EMPTY = [(3, 5), (0, 4), (4, 0), (0, 0), (70, 66), (9, 3)]  # (queries, keys) of each sequence


def oracle(q, k, v, causal, scale=None):
    """Dense attention in float64 and its logarithms, by SDPA with an explicit mask where there is anything to see."""
    group, (q_len, k_len) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device)
    mask = mask.tril(k_len - q_len) if causal else mask
    seeing = mask.any(-1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, mask = q.transpose(1, 2)[:, :, seeing], mask[seeing]
    seen = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    scores = (rows @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    out, lse = torch.zeros_like(q.transpose(1, 2)), torch.full_like(q[..., 0].transpose(1, 2), -math.inf)
    out[:, :, seeing], lse[:, :, seeing] = seen, scores.logsumexp(-1)
    return out.transpose(1, 2), lse


def varlen_oracle(q, k, v, causal, batch):
    """The same, one sequence after another."""
    outs, lses, at, k_at = [], [], 0, 0
    for queries, keys in batch:
        tokens, seen = slice(at, at + queries), slice(k_at, k_at + keys)
        out, lse = oracle(q[None, tokens], k[None, seen], v[None, seen], causal)
        outs, lses, at, k_at = [*outs, out[0]], [*lses, lse[0]], at + queries, k_at + keys
    return torch.cat(outs), torch.cat(lses, dim=1)


def inputs(place: Place, dtype: str, heads, head_dim: int, q_shape, k_shape) -> list[torch.Tensor]:
    """q, k, v and a gradient for the result, all different."""
    shapes = [(*q_shape, heads[0], head_dim), *[(*k_shape, heads[1], head_dim)] * 2, (*q_shape, heads[0], head_dim)]
    return [place.random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def compare(place: Place, dtype: str, q, k, v, grad, causal, expected, **options) -> None:
    """Result, logarithm and all gradients, with a gradient that comes through the logarithm too."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = op.flash_attention(q, k, v, causal, return_lse=True, interpret=place.interpret, **options)
    wide_out, wide_lse = expected(*wide)
    grad_lse = place.random(*lse.shape, seed=9)
    ours = torch.autograd.grad([out, lse], [q, k, v], [grad, grad_lse])
    theirs = torch.autograd.grad([wide_out, wide_lse], wide, [grad.double(), grad_lse.double()], allow_unused=True)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert_close(out, wide_out, dtype)
    assert_close(lse, wide_lse, "fp32")
    for x, dx, expected_dx in zip((q, k, v), ours, theirs, strict=True):
        assert dx.dtype == x.dtype and dx.shape == x.shape
        assert_close(dx, torch.zeros_like(dx) if expected_dx is None else expected_dx, dtype, times=2)


def agrees(
    place: Place, dtype="fp32", q_len=5, k_len=5, heads=(2, 1), head_dim=16, causal=True, batch=1, scale=None
):  # fmt: skip
    tensors = inputs(place, dtype, heads, head_dim, (batch, q_len), (batch, k_len))
    compare(place, dtype, *tensors, causal, partial(oracle, causal=causal, scale=scale), scale=scale)


def lengths(place: Place, dtype: str, causal: bool) -> None:
    """Each pair of lengths around the blocks of one kernel, and a few around those of all."""
    forward, (keys, queries) = choose_tile(16, DTYPES[dtype]), choose_tiles(16, DTYPES[dtype], True, False)
    edges = {tile[name] for tile in (forward, keys, queries) for name in ("BLOCK_M", "BLOCK_N")}
    small, large = min(edges), max(edges)
    pairs = list(itertools.product((0, 1, small - 1, small, small + 1), repeat=2))
    pairs += [(large - 1, large + 1), (large, 1), (large + 1, large), (1, large)]
    for q_len, k_len in pairs:
        agrees(place, dtype, q_len, k_len, (1, 1), causal=causal)


def of_variable_length(place: Place, dtype: str, causal: bool, batch=EMPTY, head_dim=16, heads=(4, 2)) -> None:
    totals = [sum(lengths) for lengths in zip(*batch, strict=True)]
    tensors = inputs(place, dtype, heads, head_dim, totals[:1], totals[1:])
    compare(place, dtype, *tensors, causal, partial(varlen_oracle, causal=causal, batch=batch), **packed(place, batch))


def packed(place: Place, batch, more: int = 0) -> dict:
    """cu_seqlens and the longest lengths, or `more`."""
    options = {}
    for name, of in (("q", 0), ("k", 1)):
        found = [pair[of] for pair in batch]
        starts = torch.tensor([0, *itertools.accumulate(found)], dtype=torch.int32)
        options |= {f"cu_seqlens_{name}": starts.to(place.device), f"max_seqlen_{name}": max(found) + more}
    return options


def the_longest_may_be_overstated(place: Place) -> None:
    q, k, v, _ = inputs(place, "fp32", (2, 1), 16, (8,), (10,))
    exact, more = packed(place, [(3, 5), (5, 5)]), packed(place, [(3, 5), (5, 5)], more=100)
    ours = op.flash_attention(q, k, v, interpret=place.interpret, **more)
    assert torch.equal(ours, op.flash_attention(q, k, v, interpret=place.interpret, **exact))


def sequences_do_not_leak(place: Place) -> None:
    """NaN in one sequence stays there, though its rows follow those of the one before in the same block."""
    batch = [(5, 9), (7, 7), (4, 20)]
    q, k, v, grad = inputs(place, "fp32", (2, 1), 16, (16,), (36,))
    for x, rows in ((q, slice(5, 12)), (k, slice(9, 16)), (v, slice(9, 16)), (grad, slice(5, 12))):
        x[rows] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = op.flash_attention(*leaves, interpret=place.interpret, **packed(place, batch))
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    for x, rows in ((out, slice(5, 12)), (dq, slice(5, 12)), (dk, slice(9, 16)), (dv, slice(9, 16))):
        assert x[rows].isnan().all() and x.isnan().sum() == x[rows].numel()


def strides(place: Place, dtype: str) -> None:
    """A transposed (batch, heads, tokens, dim), parts of a fused projection, and rows with NaN between them."""
    q, k, v, grad = inputs(place, dtype, (4, 4), 16, (2, 37), (2, 37))
    check = partial(compare, place, dtype, causal=True, expected=partial(oracle, causal=True))
    q, k, v, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
    check(q, k, v, grad)
    check(*torch.cat([q, k, v], dim=2).split(4, dim=2), grad)
    check(*(place.strided(x) for x in (q, k, v, grad)))
    check(*(x.expand(2, -1, -1, -1) for x in (q[:1], k[:1], v[:1])), grad)


def gradients_of_all_kinds(place: Place) -> None:
    """Of the result alone, of its sum (an expanded scalar), of the logarithm alone."""
    q, k, v, grad = inputs(place, "fp32", (2, 1), 16, (1, 7), (1, 9))
    leaves, wide = (
        [x.clone().requires_grad_() for x in xs] for xs in ((q, k, v), (q.double(), k.double(), v.double()))
    )
    for of in (lambda out, _: (out * grad).sum(), lambda out, _: out.sum(), lambda _, lse: lse.sum()):
        ours = of(*op.flash_attention(*leaves, return_lse=True, interpret=place.interpret))
        theirs = torch.autograd.grad(of(*oracle(*wide, causal=True)), wide, allow_unused=True)
        for dx, expected in zip(torch.autograd.grad(ours, leaves), theirs, strict=True):
            assert_close(dx, torch.zeros_like(dx) if expected is None else expected, "fp32")


def a_blind_row_passes_nothing_on(place: Place) -> None:
    """Nor does it where the gradient of its logarithm, which is -inf, is no number."""
    q, k, v, grad = inputs(place, "fp32", (2, 1), 16, (1, 9), (1, 7))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = op.flash_attention(*leaves, return_lse=True, interpret=place.interpret)
    grad_lse = torch.zeros_like(lse)
    clean = torch.autograd.grad([out, lse], leaves, [grad, grad_lse], retain_graph=True)
    grad_lse[:, :, :2] = torch.nan
    found = torch.autograd.grad([out, lse], leaves, [grad, grad_lse])
    assert (lse[:, :, :2] == -math.inf).all() and not out[:, :2].any() and not found[0][:, :2].any()
    assert all(torch.equal(x, y) for x, y in zip(clean, found, strict=True))


def parts_merge_into_the_whole(place: Place) -> None:
    """Causal attention over the last keys, all of those before, and none: in any order and grouping, gradients too."""
    q, k, v, grad = inputs(place, "fp32", (4, 2), 16, (2, 8), (2, 20))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend = partial(op.flash_attention, return_lse=True, interpret=place.interpret)
    cuts = ((slice(0, 5), False), (slice(5, 12), False), (slice(12, 20), True), (slice(20, 20), False))
    a, b, c, none = (attend(q, k[:, keys], v[:, keys], causal) for keys, causal in cuts)
    whole, lse = attend(q, k, v)
    expected = torch.autograd.grad(whole, leaves, grad)
    together = [op.merge(*op.merge(*a, *b), *c), op.merge(*a, *op.merge(*b, *c)), op.merge(*op.merge(*c, *none), *a)]
    together[2] = op.merge(*b, *together[2])
    for out, merged_lse in together:
        assert_close(out, whole, "fp32")
        assert_close(merged_lse, lse, "fp32")
        for dx, dx_whole in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), expected, strict=True):
            assert_close(dx, dx_whole, "fp32")


def nothing_to_do(place: Place) -> None:
    for batch, q_len, k_len in ((0, 3, 3), (2, 0, 0), (2, 3, 0), (2, 0, 3)):
        agrees(place, q_len=q_len, k_len=k_len, batch=batch)
    of_variable_length(place, "fp32", True, batch=[(0, 0), (0, 0)])


CASES = (
    {
        f"lengths, {dtype}{', causal' * causal}": partial(lengths, dtype=dtype, causal=causal)
        for dtype in DTYPES
        for causal in (False, True)
    }
    | {
        f"group of {group}": partial(agrees, q_len=35, k_len=40, heads=(2 * group, 2), batch=2, dtype=dtype)
        for group, dtype in ((1, "bf16"), (2, "fp32"), (4, "fp16"), (7, "bf16"))
    }
    | {
        f"head_dim {head_dim}, {dtype}": partial(
            agrees, dtype=dtype, q_len=37, k_len=70, head_dim=head_dim, causal=dtype != "fp16"
        )
        for head_dim in (32, 64, 128)
        for dtype in DTYPES
    }
    | {
        f"variable length, {dtype}{', causal' * causal}": partial(of_variable_length, dtype=dtype, causal=causal)
        for dtype, causal in (("fp32", False), ("bf16", True), ("fp16", True))
    }
    | {f"strides, {dtype}": partial(strides, dtype=dtype) for dtype in ("fp32", "bf16")}
    | {
        "a scale": partial(agrees, scale=1.5, dtype="fp32"),
        "several tiles of heads": partial(agrees, dtype="bf16", q_len=200, k_len=260, heads=(2, 2), head_dim=64),
        "the longest may be overstated": the_longest_may_be_overstated,
        "sequences do not leak": sequences_do_not_leak,
        "gradients of all kinds": gradients_of_all_kinds,
        "a blind row passes nothing on": a_blind_row_passes_nothing_on,
        "parts merge into the whole": parts_merge_into_the_whole,
        "nothing to do": nothing_to_do,
    }
)
