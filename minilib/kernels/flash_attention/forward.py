"""FlashAttention's forward kernel: a tile of queries goes past the keys that it sees, block by block.

Names are the paper's: of each query m is the running maximum of its scores, l the running sum of their exponentials,
acc the running sum of values, and alpha the factor by which l and acc shrink when a block raises m. Suffixes are
shapes: M queries of the tile, N keys of a block, D head_dim.

Source: Dao 2023, "FlashAttention-2", algorithm 1, and section 3.1 for blocks that need no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.kernels.flash_attention.tiles import (
    CASES,
    EVERY_CASE,
    Problem,
    build_of,
    describe,
    head_at,
    jit,
    keys_seen,
    packed_at,
    read_rows,
    suits_copy_engine,
    task,
    write_rows,
)
from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import launch, target_of, triton
from minilib.mechanisms.basics.arithmetic import ceil_div

if triton:
    import triton.language as tl

# Alternatives to `choose_tile` for a tuning run on a GPU.
CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps in ((64, 64, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8))
    for stages in (2, 3, 4)
]
# Two programs on a multiprocessor, each with half of its registers: one multiplies while the other waits.
CANDIDATES += [
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": stages, "maxnreg": 128} for stages in (2, 3)
]


def attend(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, contiguous, and the natural logarithms (…, heads, tokens); `tile`: instead of `choose_tile`'s."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = (problem.num_heads, problem.q_len) if problem.varlen else (problem.batch, problem.num_heads, problem.q_len)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():  # nobody sees a key
        return out.zero_(), lse.fill_(-torch.inf)
    tile = tile or choose_tile(problem.head_dim, q.dtype, target_of(q))
    blocks, tma = ceil_div(problem.max_q, tile["BLOCK_M"]), suits_copy_engine(k, v)
    read = [describe(x, tile["BLOCK_N"]) for x in (k, v)] if tma else (k, v)
    launch(
        forward, blocks * problem.batch * problem.num_heads, out, lse, q, *read, cu_q, cu_k, problem.scale,
        problem.q_len, problem.k_len, problem.num_heads, blocks,
        problem.section(problem.max_k, q.itemsize, problem.num_heads), *problem.strides(q, k, v),
        TMA=tma, **problem.constants(q.dtype), **tile,
    )  # fmt: skip
    return out, lse


@jit
def forward(
    out_ptr, lse_ptr, q, k, v, cu_q_ptr, cu_k_ptr, scale, q_len, k_len, num_heads, num_blocks, section,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, UPCAST: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head; with VARLEN, q_len and k_len count the tokens of all sequences."""
    LOG2E: tl.constexpr = 1.4426950408889634
    block, sequence, head, q_start, queries, k_start, keys = task(
        cu_q_ptr, cu_k_ptr, q_len, k_len, num_heads, num_blocks, section, CAUSAL, VARLEN
    )
    first = block * BLOCK_M
    if first >= queries:
        return

    q_at = head_at(q, sequence, q_start, head, stride_qb, stride_qt, stride_qh)
    q_MD = read_rows(q_at, sequence, head, first, queries, stride_qt, BLOCK_M, HEAD_DIM, True, UPCAST)
    if TMA:
        k_at, v_at = k, v
    else:
        k_at = head_at(k, sequence, k_start, head // GROUP, stride_kb, stride_kt, stride_kh)
        v_at = head_at(v, sequence, k_start, head // GROUP, stride_vb, stride_vt, stride_vh)
    full, end, last = keys_seen(first, queries, keys, CAUSAL, BLOCK_M, BLOCK_N)
    m_M, l_M = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.full((BLOCK_M,), 0.0, tl.float32)
    acc_MD = tl.full((BLOCK_M, HEAD_DIM), 0.0, tl.float32)
    acc_MD, m_M, l_M = _sum_over_keys(
        acc_MD, m_M, l_M, q_MD, k_at, v_at, sequence, head // GROUP, 0, full, keys, last, scale * LOG2E, stride_kt,
        stride_vt, HEAD_DIM, False, UPCAST, TMA, BLOCK_N,
    )  # fmt: skip
    acc_MD, m_M, l_M = _sum_over_keys(
        acc_MD, m_M, l_M, q_MD, k_at, v_at, sequence, head // GROUP, full, end, keys, last, scale * LOG2E, stride_kt,
        stride_vt, HEAD_DIM, True, UPCAST, TMA, BLOCK_N,
    )  # fmt: skip

    l_M = tl.where(l_M == 0.0, 1.0, l_M)  # of a query that saw no key
    row = first + tl.arange(0, BLOCK_M)
    out_row, lse_row = packed_at(sequence, q_start, head, q_len, num_heads, VARLEN)
    tl.store(lse_ptr + lse_row + row, (m_M + tl.log2(l_M)) / LOG2E, mask=row < queries)
    write_rows(out_ptr, out_row, num_heads, first, queries, acc_MD / l_M[:, None], BLOCK_M, HEAD_DIM)


@jit
def _sum_over_keys(
    acc_MD, m_M, l_M, q_MD, k_at, v_at, sequence, kv_head, begin, end, keys, last, scale_log2, stride_kt, stride_vt,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take in the blocks of keys from `begin` to `end`; most need no MASKED, and none of what it costs."""
    for first in range(begin, end, BLOCK_N):
        k_ND = read_rows(k_at, sequence, kv_head, first, keys, stride_kt, BLOCK_N, HEAD_DIM, MASKED, UPCAST, TMA)
        v_ND = read_rows(v_at, sequence, kv_head, first, keys, stride_vt, BLOCK_N, HEAD_DIM, MASKED, UPCAST, TMA)
        # 1. Scores of this block.
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if MASKED:
            visible_MN = (first + tl.arange(0, BLOCK_N))[None, :] <= last[:, None]
            s_MN = tl.where(visible_MN, s_MN, -float("inf"))
        # 2. The running maximum, and the exponentials: one multiply-add and one exp2 a score.
        new_m_M = tl.maximum(m_M, tl.max(s_MN, 1) * scale_log2)
        base_M = new_m_M
        if MASKED:  # a row that has seen nothing yet: -inf - -inf is NaN
            base_M = tl.where(new_m_M == -float("inf"), 0.0, new_m_M)
        p_MN = tl.exp2(s_MN * scale_log2 - base_M[:, None])
        # 3. alpha = exp(m of before - m), with which the running sum of the exponentials takes these in.
        alpha_M = tl.exp2(m_M - base_M)
        l_M = l_M * alpha_M + tl.sum(p_MN, 1)
        # 4. Values, weighted by them, go into acc. Who divides by l does so once, after the last block.
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * alpha_M[:, None], input_precision="ieee")
        m_M = new_m_M
    return acc_MD, m_M, l_M


def choose_tile(head_dim: int, dtype: torch.dtype, target: str = "sm_80") -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages: as large as the registers of each GPU hold without spilling.

    Hopper multiplies from shared memory, of which it has 227 KiB, and so has registers left for a block of 128 keys.
    Three stages are the fewest with which the next block is on its way while this one is multiplied. A program takes at
    most 225 KiB on sm_90, 96 KiB on sm_80 and 32 KiB on gfx942.
    """
    if dtype == torch.float32:  # no tensor cores multiply in full precision
        m, n, warps, stages = (16, 32, 8, 1) if head_dim == 128 else (32, 32, 4, 1)
    elif target == "gfx942":
        m, n, warps, stages = 128, 64, 4, 1
    elif target in ("sm_90", "sm_100"):
        m, n, warps, stages = 128, 128, 8, 3
    else:
        m, n, warps, stages = 128, 64, 8, 3
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: the default tile of each case.

    On sm_90 dense 16-bit K and V come through TMA, if they suit it: of every case there are both.
    """
    found = []
    for case in EVERY_CASE if every else CASES:
        tile = choose_tile(case.head_dim, case.dtype, target)
        tma = target == "sm_90" and not case.varlen and case.dtype.itemsize == 2
        if tma:
            found.append(build_of(forward, "forward", case, tile, dots=2, copied=("k", "v")))
        if every or not tma:
            found.append(build_of(forward, "forward", case, tile, dots=2))
    return found
