"""FlashAttention backward: the gradients of q, k and v from the saved logarithms, without a stored score.

Three kernels, none with atomics, so that the result is the same bits each time:
`prepare` computes delta, each row's Σ dO·O; `backward_keys` takes a tile of keys past all queries that see it, of all
heads of its group; `backward_queries` takes a tile of queries past all keys that it sees. Both compute anew the scores
s and the probabilities p = exp(s - lse), where lse is m + log l of the forward pass. With dp = dO Vᵀ the gradient of
the scores is ds = p · (dp - delta). Suffixes are shapes: M queries, N keys, D head_dim.

Source: Dao et al. 2022, "FlashAttention", algorithm 4; Dao 2023, "FlashAttention-2", algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.kernels.flash_attention.tiles import (
    CASES,
    EVERY_CASE,
    Problem,
    build_of,
    head_at,
    jit,
    keys_seen,
    packed_at,
    read_rows,
    schedule,
    span,
    task,
    write_rows,
)
from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import launch, target_of, triton
from minilib.mechanisms.basics.arithmetic import ceil_div

if triton:
    import triton.language as tl

ROWS = 64  # that a program of `prepare` takes at a time
# Alternatives for a tuning run on a GPU, for each kernel that multiplies.
CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps in ((64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8))
    for stages in (1, 2, 3)
]


def gradients(
    problem: Problem, grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, keys_tile: dict | None = None, queries_tile: dict | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, contiguous, from the gradients of `out` and `lse`, if any; tiles: instead of `choose_tiles`'."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel() or not k.numel():  # nothing was attended to
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta, sizes = torch.empty_like(lse), (problem.q_len, problem.k_len, problem.num_heads)
    for_keys, for_queries = choose_tiles(problem.head_dim, q.dtype, problem.causal, problem.varlen, target_of(q))
    for_keys, for_queries = keys_tile or for_keys, queries_tile or for_queries
    strides, constants = problem.strides(q, k, v, grad), problem.constants(q.dtype)
    blocks = ceil_div(problem.max_q, ROWS)
    launch(
        prepare, blocks * problem.batch * problem.num_heads, delta, out, grad, lse, grad_lse, cu_q, problem.q_len,
        problem.num_heads, blocks, 1, *problem.strides(grad), HEAD_DIM=problem.head_dim, VARLEN=problem.varlen,
        BLOCK_M=ROWS,
    )  # fmt: skip
    blocks = ceil_div(problem.max_k, for_keys["BLOCK_N"])
    launch(
        backward_keys, blocks * problem.batch * problem.num_kv_heads, dk, dv, q, k, v, grad, lse, delta, cu_q, cu_k,
        problem.scale, *sizes, blocks, problem.section(problem.max_q * problem.group, q.itemsize, problem.num_kv_heads),
        *strides, **constants, **for_keys,
    )  # fmt: skip
    blocks = ceil_div(problem.max_q, for_queries["BLOCK_M"])
    launch(
        backward_queries, blocks * problem.batch * problem.num_heads, dq, q, k, v, grad, lse, delta, cu_q, cu_k,
        problem.scale, *sizes, blocks, problem.section(problem.max_k, q.itemsize, problem.num_heads), *strides,
        **constants, **for_queries,
    )  # fmt: skip
    return dq, dk, dv


@jit
def prepare(
    delta_ptr, out_ptr, grad, lse_ptr, grad_lse_ptr, cu_q_ptr, q_len, num_heads, num_blocks, section,
    stride_gb, stride_gt, stride_gh, HEAD_DIM: tl.constexpr, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = Σ dO·O - dlse of BLOCK_M rows of one head; 0 for a row that saw nothing."""
    block, pair = schedule(num_blocks, section, False)
    sequence, head = pair // num_heads, pair % num_heads
    start, queries = span(cu_q_ptr, sequence, q_len, VARLEN)
    out_row, lse_row = packed_at(sequence, start, head, q_len, num_heads, VARLEN)
    first = block * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    there = row < queries
    out_at, stride_ot = out_ptr + out_row * HEAD_DIM, num_heads * HEAD_DIM
    out = read_rows(out_at, sequence, head, first, queries, stride_ot, BLOCK_M, HEAD_DIM, True, False)
    grad_at = head_at(grad, sequence, start, head, stride_gb, stride_gt, stride_gh)
    grad_out = read_rows(grad_at, sequence, head, first, queries, stride_gt, BLOCK_M, HEAD_DIM, True, False)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + lse_row + row, mask=there, other=0.0)
    lse = tl.load(lse_ptr + lse_row + row, mask=there, other=0.0)
    tl.store(delta_ptr + lse_row + row, tl.where(lse == -float("inf"), 0.0, delta), mask=there)


@jit
def backward_keys(
    dk_ptr, dv_ptr, q, k, v, grad, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, scale, q_len, k_len, num_heads, num_blocks,
    section, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one kv head, summed over the queries of all its heads, one head after another."""
    num_kv_heads = num_heads // GROUP
    block, sequence, kv_head, q_start, queries, k_start, keys = task(
        cu_q_ptr, cu_k_ptr, q_len, k_len, num_kv_heads, num_blocks, section, False, VARLEN
    )  # not the last keys first: most queries see the first ones
    first = block * BLOCK_N
    if first >= keys:
        return

    k_at = head_at(k, sequence, k_start, kv_head, stride_kb, stride_kt, stride_kh)
    v_at = head_at(v, sequence, k_start, kv_head, stride_vb, stride_vt, stride_vh)
    k_tile = read_rows(k_at, sequence, kv_head, first, keys, stride_kt, BLOCK_N, HEAD_DIM, True, UPCAST)
    v_tile = read_rows(v_at, sequence, kv_head, first, keys, stride_vt, BLOCK_N, HEAD_DIM, True, UPCAST)
    # Queries in blocks: those on the diagonal, those that see all of these keys, and a last block cut short.
    whole, cut = queries // BLOCK_M, (queries + BLOCK_M - 1) // BLOCK_M
    begin, full = whole * 0, whole * 0
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first + queries - keys, 0) // BLOCK_M, cut)
        full = tl.maximum(first + queries - keys + BLOCK_N + BLOCK_M - 2, 0) // BLOCK_M
    full = tl.minimum(full, cut)
    diagonal, last = full - begin, tl.maximum(full, whole)
    dk, dv = tl.full((BLOCK_N, HEAD_DIM), 0.0, tl.float32), tl.full((BLOCK_N, HEAD_DIM), 0.0, tl.float32)
    dk, dv = _sum_over_queries(
        dk, dv, k_tile, v_tile, q, grad, lse_ptr, delta_ptr, sequence, kv_head, q_start, q_len, num_heads, begin,
        diagonal, last, diagonal + cut - last, first, queries, keys, scale, stride_qb, stride_qt, stride_qh, stride_gb,
        stride_gt, stride_gh, GROUP, HEAD_DIM, CAUSAL, VARLEN, True, UPCAST, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dk, dv = _sum_over_queries(
        dk, dv, k_tile, v_tile, q, grad, lse_ptr, delta_ptr, sequence, kv_head, q_start, q_len, num_heads, full,
        diagonal, last, whole - full, first, queries, keys, scale, stride_qb, stride_qt, stride_qh, stride_gb,
        stride_gt, stride_gh, GROUP, HEAD_DIM, CAUSAL, VARLEN, False, UPCAST, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    row, _ = packed_at(sequence, k_start, kv_head, k_len, num_kv_heads, VARLEN)
    write_rows(dk_ptr, row, num_kv_heads, first, keys, dk * scale, BLOCK_N, HEAD_DIM)
    write_rows(dv_ptr, row, num_kv_heads, first, keys, dv, BLOCK_N, HEAD_DIM)


@jit
def _sum_over_queries(
    dk_ND, dv_ND, k_tile, v_tile, q, grad, lse_ptr, delta_ptr, sequence, kv_head, q_start, q_len, num_heads, begin,
    diagonal, last, blocks, first, queries, keys, scale, stride_qb, stride_qt, stride_qh, stride_gb, stride_gt,
    stride_gh, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add so many blocks of queries from block `begin` on; with MASKED, block `last` follows `diagonal` of them."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head, i = kv_head * GROUP, blocks * 0
    for _ in range(0, GROUP * tl.maximum(blocks, 0)):
        number = begin + i
        if MASKED:
            number = tl.where(i < diagonal, number, last)
        q_at = head_at(q, sequence, q_start, head, stride_qb, stride_qt, stride_qh)
        grad_at = head_at(grad, sequence, q_start, head, stride_gb, stride_gt, stride_gh)
        _, lse_row = packed_at(sequence, q_start, head, q_len, num_heads, VARLEN)
        lse_at, delta_at = lse_ptr + lse_row, delta_ptr + lse_row
        at, row = number * BLOCK_M, number * BLOCK_M + tl.arange(0, BLOCK_M)
        q_MD = read_rows(q_at, sequence, head, at, queries, stride_qt, BLOCK_M, HEAD_DIM, MASKED, UPCAST)
        g_MD = read_rows(grad_at, sequence, head, at, queries, stride_gt, BLOCK_M, HEAD_DIM, MASKED, UPCAST)
        there_M = row < queries
        # 1. The probabilities, from scores computed anew. lse and delta are read as late as can be: a thread has few
        # registers left beside dk, dv and two tiles of scores.
        s_NM = tl.dot(k_tile, tl.trans(q_MD), input_precision="ieee")
        if MASKED:  # a row that is none has the probability exp2(-inf) = 0
            lse_M = tl.load(lse_at + row, mask=there_M, other=float("inf"))
        else:
            lse_M = tl.load(lse_at + row)
        p_NM = tl.exp2(s_NM * (scale * LOG2E) - (lse_M * LOG2E)[None, :])
        if MASKED and CAUSAL:
            key = first + queries - keys + tl.arange(0, BLOCK_N)
            p_NM = tl.where(key[:, None] <= row[None, :], p_NM, 0.0)
        # 2. dV = Pᵀ dO.
        dv_ND = tl.dot(p_NM.to(g_MD.dtype), g_MD, dv_ND, input_precision="ieee")
        # 3. The scores' gradient, from that of the probabilities.
        dp_NM = tl.dot(v_tile, tl.trans(g_MD), input_precision="ieee")
        if MASKED:
            delta_M = tl.load(delta_at + row, mask=there_M, other=0.0)
        else:
            delta_M = tl.load(delta_at + row)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        # 4. dK = dSᵀ Q, but for the scale.
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
        i += 1
        head = tl.where(i == blocks, head + 1, head)
        i = tl.where(i == blocks, 0, i)
    return dk_ND, dv_ND


@jit
def backward_queries(
    dq_ptr, q, k, v, grad, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, scale, q_len, k_len, num_heads, num_blocks, section,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_gb,
    stride_gt, stride_gh, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head."""
    block, sequence, head, q_start, queries, k_start, keys = task(
        cu_q_ptr, cu_k_ptr, q_len, k_len, num_heads, num_blocks, section, CAUSAL, VARLEN
    )
    first = block * BLOCK_M
    if first >= queries:
        return

    q_at = head_at(q, sequence, q_start, head, stride_qb, stride_qt, stride_qh)
    grad_at = head_at(grad, sequence, q_start, head, stride_gb, stride_gt, stride_gh)
    q_tile = read_rows(q_at, sequence, head, first, queries, stride_qt, BLOCK_M, HEAD_DIM, True, UPCAST)
    grad_tile = read_rows(grad_at, sequence, head, first, queries, stride_gt, BLOCK_M, HEAD_DIM, True, UPCAST)
    k_at = head_at(k, sequence, k_start, head // GROUP, stride_kb, stride_kt, stride_kh)
    v_at = head_at(v, sequence, k_start, head // GROUP, stride_vb, stride_vt, stride_vh)
    row = first + tl.arange(0, BLOCK_M)
    out_row, lse_row = packed_at(sequence, q_start, head, q_len, num_heads, VARLEN)
    lse = tl.load(lse_ptr + lse_row + row, mask=row < queries, other=float("inf"))
    delta = tl.load(delta_ptr + lse_row + row, mask=row < queries, other=0.0)
    full, end, last = keys_seen(first, queries, keys, CAUSAL, BLOCK_M, BLOCK_N)
    dq = tl.full((BLOCK_M, HEAD_DIM), 0.0, tl.float32)
    dq = _sum_over_keys(
        dq, q_tile, grad_tile, lse, delta, k_at, v_at, sequence, head // GROUP, 0, full, keys, last, scale, stride_kt,
        stride_vt, HEAD_DIM, False, UPCAST, BLOCK_N,
    )  # fmt: skip
    dq = _sum_over_keys(
        dq, q_tile, grad_tile, lse, delta, k_at, v_at, sequence, head // GROUP, full, end, keys, last, scale, stride_kt,
        stride_vt, HEAD_DIM, True, UPCAST, BLOCK_N,
    )  # fmt: skip
    write_rows(dq_ptr, out_row, num_heads, first, queries, dq * scale, BLOCK_M, HEAD_DIM)


@jit
def _sum_over_keys(
    dq_MD, q_tile, grad_tile, lse, delta, k_at, v_at, sequence, kv_head, begin, end, keys, last, scale, stride_kt,
    stride_vt, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the blocks of keys from `begin` to `end`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    for first in range(begin, end, BLOCK_N):
        k_ND = read_rows(k_at, sequence, kv_head, first, keys, stride_kt, BLOCK_N, HEAD_DIM, MASKED, UPCAST)
        v_ND = read_rows(v_at, sequence, kv_head, first, keys, stride_vt, BLOCK_N, HEAD_DIM, MASKED, UPCAST)
        # 1. The probabilities, from scores computed anew.
        s_MN = tl.dot(q_tile, tl.trans(k_ND), input_precision="ieee")
        p_MN = tl.exp2(s_MN * (scale * LOG2E) - (lse * LOG2E)[:, None])
        if MASKED:
            p_MN = tl.where((first + tl.arange(0, BLOCK_N))[None, :] <= last[:, None], p_MN, 0.0)
        # 2. The scores' gradient, from that of the probabilities.
        dp_MN = tl.dot(grad_tile, tl.trans(v_ND), input_precision="ieee")
        ds_MN = p_MN * (dp_MN - delta[:, None])
        # 3. dQ = dS K, but for the scale.
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    return dq_MD


def choose_tiles(
    head_dim: int, dtype: torch.dtype, causal: bool, varlen: bool, target: str = "sm_80"
) -> tuple[dict[str, int], dict[str, int]]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of `backward_keys` and of `backward_queries`.

    As large as the registers hold without spilling: dK, dV and two tiles of scores, or dQ and two. Three stages are the
    fewest with which the next block is on its way while this one is multiplied. Hopper multiplies from shared memory,
    of which it has 227 KiB: programs take at most 161 KiB there, 96 KiB on sm_80, 16 KiB on gfx942.
    """
    wide = head_dim == 128
    if dtype == torch.float32:  # no tensor cores multiply in full precision
        tiles = ((64 if head_dim == 16 else 32, 32, 8, 1), (32, 32, 4, 1))
        tiles = ((16, 32, 8, 1), (16, 16, 4, 1)) if wide else tiles
    elif target == "gfx942":
        tiles = ((32 if wide else 64, 64, 4, 1), (64, 64, 4, 1))
    elif target in ("sm_90", "sm_100"):
        # With cu_seqlens and a diagonal at once, four more registers a thread are needed than there are.
        rows = 32 if wide and causal and varlen else 64
        tiles = ((rows, 128, 8, 3), (128, 64 if wide else 128, 8, 3))
    else:  # its smaller relatives, which are given the same tiles, have 99 KiB of shared memory where an A100 has 163
        tiles = ((32, 64, 8, 3), (128, 32, 8, 3)) if wide else ((64, 64, 4, 3), (64, 64, 4, 3))
    keys, queries = (
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages} for m, n, warps, stages in tiles
    )
    return keys, queries


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: `prepare`, which knows neither diagonal nor group, and each case's tiles."""
    cases, row = EVERY_CASE if every else CASES, {"BLOCK_M": ROWS, "num_warps": 4, "num_stages": 1}
    preparing = [case for case in cases if case.causal and case.group == 4] if every else CASES[:1]
    found = [build_of(prepare, "prepare", case, row) for case in preparing]
    for case in cases:
        keys, queries = choose_tiles(case.head_dim, case.dtype, case.causal, case.varlen, target)
        found.append(build_of(backward_keys, "dK and dV", case, keys, dots=4))
        found.append(build_of(backward_queries, "dQ", case, queries, dots=3))
    return found
