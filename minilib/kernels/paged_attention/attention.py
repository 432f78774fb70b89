"""Attention over a paged KV cache: prefill, decode and any mix of both in one launch, for one layer.

A sequence's keys and values lie in pages of `page_size` tokens anywhere in the cache; its block table says which page
holds which of its tokens. Query token t of a sequence with q_len queries and context_len cached tokens stands at
position context_len - q_len + t and sees keys 0 … its own position.

Sources: Dao 2023, "FlashAttention-2"; Dao et al. 2023, "Flash-Decoding for long-context inference"; Kwon et al. 2023,
"Efficient Memory Management for Large Language Model Serving with PagedAttention".
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from minilib.kernels.paged_attention.checks import check_tensors, check_values
from minilib.kernels.paged_attention.tiles import (
    CASES,
    EVERY_CASE,
    HEAD_DIMS,
    MAX_SPLITS,
    choose_split,
    choose_tile,
    takes_short_tile,
)
from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import DTYPES, launch, runs_kernel, target_of, triton, upcasts
from minilib.mechanisms.basics.arithmetic import ceil_div, round_up
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

_jit = (
    triton.jit(do_not_specialize=["num_tokens", "num_seqs", "num_splits", "split_keys"])
    if triton
    else lambda kernel: kernel
)


def reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`paged_attention` in plain torch, one sequence after another: the oracle, and what runs where there is no GPU.

    It computes in float32, in float64 for float64 tensors, which only it takes, and waits for a GPU to see the lengths.
    """
    check_tensors((q, k_pages, v_pages, block_tables, context_lens, cu_seqlens_q), (*DTYPES, torch.float64))
    starts, contexts = check_values(q, k_pages, block_tables, context_lens, cu_seqlens_q)
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k_pages.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for i, context in enumerate(contexts):
        tokens = slice(starts[i], starts[i + 1])
        pages = block_tables[i, : ceil_div(context, k_pages.shape[2])].long()
        # (pages, kv heads, page_size, head_dim) → (kv heads, context, head_dim), then a kv head for each query head
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :context].to(wide) for x in (k_pages, v_pages))
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        scores = q[tokens].transpose(0, 1).to(wide) @ k.transpose(1, 2) * scale
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(context - len(q[tokens]) + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        weights = weights.masked_fill(hidden, 0)  # softmax of a row that sees nothing is NaN
        out[tokens] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    scale: float | None = None, max_q_len: int | None = None, split_keys: int | None = None, interpret: bool = False,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's query tokens over its keys and values in the paged cache; forward only.

    A Triton kernel on a GPU, elsewhere `reference`. Nothing here waits for the GPU: what the integer tensors hold is
    checked on the CPU alone, and lengths or page numbers out of range are an illegal access on a GPU.

    Args:
        q: (num_tokens, num_heads, head_dim) fp32, fp16 or bf16: the step's tokens by sequence, then any padding.
        k_pages, v_pages: (num_pages, num_kv_heads, page_size, head_dim), q's dtype; num_heads is a multiple of
            num_kv_heads, at most 128 times as many (64 times, if a head takes more than 256 bytes), and head h uses kv
            head h // (num_heads // num_kv_heads).
        block_tables: (num_seqs, max_pages_per_seq) int32; entry j: the page of tokens j · page_size …. Entries past a
            sequence's end are not read, nor are pages and slots that hold none of its tokens.
        context_lens: (num_seqs,) int32: tokens in the cache, this step's own included.
        cu_seqlens_q: (num_seqs + 1,) int32: where each sequence's tokens begin in q, from 0.
        scale: factor on the scores; head_dim ** -0.5 if left out.
        max_q_len: the longest q_len, if known: it picks the tile, never the result.
        split_keys: keys that one program takes of a sequence, which so has as many programs as its own length asks for,
            64 at most; rounded up to whole blocks. `choose_split` if left out: long sequences beside short ones, and
            few sequences, keep the GPU as full as many alike.
        interpret: run the kernel in Triton's interpreter, on the CPU.

    Returns:
        (num_tokens, num_heads, head_dim), q's dtype, contiguous; 0 for padding and for a token that sees no key.

    Raises:
        TypeError, ValueError: tensors or options that do not fit; on the CPU also lengths and page numbers.

    Cost: see `cost`. Source: see above.
    """
    tensors = (q, k_pages, v_pages, block_tables, context_lens, cu_seqlens_q)
    check_tensors(tensors, DTYPES)
    if split_keys is not None and not (isinstance(split_keys, int) and split_keys > 0):
        raise ValueError(f"split_keys must be a whole number of keys above 0, or None, got {split_keys!r}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("q, k_pages or v_pages wants a gradient, and this is forward only: call it in torch.no_grad()")
    if not runs_kernel(q, interpret):
        return reference(*tensors, scale)
    if not q.is_cuda:
        check_values(q, k_pages, block_tables, context_lens, cu_seqlens_q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not len(context_lens) or not len(q):
        return out.zero_()
    _launch(out, *tensors, q.shape[-1] ** -0.5 if scale is None else scale, max_q_len, split_keys)
    return out


def cost(
    num_heads: int, num_kv_heads: int, head_dim: int, context_lens: list[int], q_lens: list[int],
    dtype: str | torch.dtype = "bf16", page_size: int = 16,
) -> Cost:  # fmt: skip
    """4 · head_dim FLOPs per head and visible pair of query and key; K, V, block table, q and result moved once.

    `context_lens` and `q_lens` are in tokens; `dtype` is "bf16", "fp16", "fp32" or torch's. ValueError if one is not.
    """
    dtype, pairs = DTYPES.get(dtype, dtype), list(zip(context_lens, q_lens, strict=True))
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, got {dtype!r}")
    if any(not 0 <= queries <= context for context, queries in pairs):
        raise ValueError(f"each q_len must be from 0 to its context_len, got (context_len, q_len) pairs {pairs}")
    visible = sum(queries * (context - queries) + queries * (queries + 1) // 2 for context, queries in pairs)
    read = [context for context, queries in pairs if queries]
    numbers = 2 * head_dim * (num_kv_heads * sum(read) + num_heads * sum(q_lens))
    moved = BYTES[dtype] * numbers + 4 * sum(ceil_div(context, page_size) for context in read)
    return Cost(4 * head_dim * num_heads * visible, moved, calls=1, dtype=dtype)


@_jit
def attend(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, cu_ptr, scale_log2, num_tokens, num_seqs, split_keys,
    stride_qt, stride_qh, stride_kp, stride_kh, stride_ks, stride_vp, stride_vh, stride_vs, stride_table,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one sequence, for all heads that share one kv head, against one stretch of its keys.

    Grid (num_tokens // BLOCK_Q + num_seqs, num_kv_heads, splits). With SPLIT, program s of the last dimension takes
    split_keys keys from s · split_keys on, and the last program all that are left. `out` receives float32 partial
    results (splits, num_tokens, num_heads, HEAD_DIM) and `lse` the base-2 logarithms of their sums of exponentials:
    -inf past a sequence's end, where no partial result is written.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block, kv_head = tl.program_id(0), tl.program_id(1)
    # Sequence i owns blocks from cu[i] // BLOCK_Q + i: never too few, so that the host need not know the lengths.
    seq, high = block * 0, num_seqs  # not a plain 0, which the interpreter could not widen below
    while high - seq > 1:
        middle = (seq + high) // 2
        reached = tl.load(cu_ptr + middle) // BLOCK_Q + middle <= block
        seq, high = tl.where(reached, middle, seq), tl.where(reached, high, middle)
    q_start, context = tl.load(cu_ptr + seq), tl.load(context_ptr + seq)
    q_len = tl.load(cu_ptr + seq + 1) - q_start
    first = (block - q_start // BLOCK_Q - seq) * BLOCK_Q
    # Padding after the last sequence counts as rows of it that see nothing, so that it is written too.
    rows_end = tl.where(seq == num_seqs - 1, num_tokens - q_start, q_len)
    if first >= rows_end:
        return

    row, dim = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    token, head = first + row // GROUP, (kv_head * GROUP + row % GROUP).to(tl.int64)
    owned = (row < BLOCK_Q * GROUP) & (token < rows_end)
    live = owned & (token < q_len)
    position = tl.where(live, context - q_len + token, -1)
    q_row = (q_start + token).to(tl.int64)
    q = tl.load(q_ptr + (q_row * stride_qt + head * stride_qh)[:, None] + dim, mask=live[:, None], other=0.0)

    begin = 0
    end = tl.where(first < q_len, context - q_len + tl.minimum(first + BLOCK_Q, q_len), 0)
    out_row = q_row * (GROUP * tl.num_programs(1)) + head
    if SPLIT:
        split = tl.program_id(2)
        out_row += split.to(tl.int64) * num_tokens * (GROUP * tl.num_programs(1))
        begin = tl.minimum(split.to(tl.int64) * split_keys, end).to(tl.int32)
        if begin >= end:
            tl.store(lse_ptr + out_row, tl.full((BLOCK_M,), -float("inf"), tl.float32), mask=owned)
            return
        end = tl.where(split == tl.num_programs(2) - 1, end, tl.minimum(end, begin + split_keys))
    # Pages lie anywhere in a cache of more than 2³¹ elements: 64-bit addresses.
    table_at = table_ptr + seq.to(tl.int64) * stride_table
    k_at, v_at = k_ptr + kv_head.to(tl.int64) * stride_kh + dim, v_ptr + kv_head.to(tl.int64) * stride_vh + dim
    key = begin + tl.arange(0, BLOCK_N)
    # Page numbers are carried from the round before. Looked up in their own round they are one more level of
    # indirection, on which Triton spends half of the stages: of three buffers of keys on their way one is left.
    page = tl.load(table_at + key // PAGE_SIZE, mask=key < end, other=0).to(tl.int64)
    m_M, l_M = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.full((BLOCK_M,), 0.0, tl.float32)
    acc_MD = tl.full((BLOCK_M, HEAD_DIM), 0.0, tl.float32)
    for _ in range(begin, end, BLOCK_N):
        there = (key < end)[:, None]  # a slot that nobody owns may hold NaN: it is not read
        slot = (key % PAGE_SIZE).to(tl.int64)
        k_ND = tl.load(k_at + (page * stride_kp + slot * stride_ks)[:, None], mask=there, other=0.0)
        v_ND = tl.load(v_at + (page * stride_vp + slot * stride_vs)[:, None], mask=there, other=0.0)
        visible_MN = key[None, :] <= position[:, None]
        key += BLOCK_N
        page = tl.load(table_at + key // PAGE_SIZE, mask=key < end, other=0).to(tl.int64)
        if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
            k_ND, v_ND = k_ND.to(tl.float32), v_ND.to(tl.float32)
        s_MN = tl.dot(q.to(k_ND.dtype), tl.trans(k_ND), input_precision="ieee")
        s_MN = tl.where(visible_MN, s_MN * scale_log2, -float("inf"))
        new_m_M = tl.maximum(m_M, tl.max(s_MN, 1))
        base_M = tl.where(new_m_M == -float("inf"), 0.0, new_m_M)  # a row that has seen nothing yet: -inf - -inf is NaN
        p_MN = tl.exp2(s_MN - base_M[:, None])
        alpha_M = tl.exp2(m_M - base_M)
        l_M = l_M * alpha_M + tl.sum(p_MN, 1)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * alpha_M[:, None], input_precision="ieee")
        m_M = new_m_M

    l_M = tl.where(l_M == 0.0, 1.0, l_M)
    if SPLIT:
        tl.store(lse_ptr + out_row, m_M + tl.log2(l_M), mask=owned)
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + dim, acc_MD / l_M[:, None], mask=owned[:, None])


@_jit
def merge(out_ptr, partial_ptr, lse_ptr, num_splits, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr):
    """One row of the result: the mean of its partial results, each weighted by its share of the exponentials' sum."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, HEAD_DIM)
    there, at = split < num_splits, split.to(tl.int64) * tl.num_programs(0) + row
    lse = tl.load(lse_ptr + at, mask=there, other=-float("inf"))
    top = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(share, 0)
    # Where no exponential was summed up, nothing was written.
    partial = tl.load(partial_ptr + at[:, None] * HEAD_DIM + dim, mask=(share != 0.0)[:, None], other=0.0)
    mean = tl.sum(partial * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + dim, mean)


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: `attend` for decode and for prefill, with and without splits, and `merge`."""
    cases, merged = (EVERY_CASE, itertools.product(DTYPES, HEAD_DIMS)) if every else (CASES, [(torch.bfloat16, 128)])
    found = []
    for q_len, split, head_dim, dtype, group in cases:
        values, what = DTYPES[dtype], f"{'decode' if q_len == 1 else 'prefill'}{', split' * split}"
        types = {name: f"*{values}" if name.endswith("_ptr") else "i32" for name in attend.arg_names}
        types |= dict.fromkeys(("table_ptr", "context_ptr", "cu_ptr"), "*i32")
        types |= {"lse_ptr": "*fp32", "scale_log2": "fp32"} | ({"out_ptr": "*fp32"} if split else {})
        options = {"GROUP": group, "HEAD_DIM": head_dim, "PAGE_SIZE": 16, "SPLIT": split, "UPCAST": False}
        options |= choose_tile(head_dim, dtype, group, q_len, target)
        name = f"{what}, {values}, head_dim {head_dim}, group {group}"
        found.append(Build.of(attend, name, types, options, dots=0 if values == "fp32" else 2))
    for dtype, head_dim in merged:
        types = {"out_ptr": f"*{DTYPES[dtype]}", "partial_ptr": "*fp32", "lse_ptr": "*fp32", "num_splits": "i32"}
        sizes = {"HEAD_DIM": head_dim, "BLOCK_S": MAX_SPLITS}
        found.append(Build(merge, f"merge, {DTYPES[dtype]}, head_dim {head_dim}", types, sizes))
    return found


def _launch(out, q, k_pages, v_pages, block_tables, context_lens, cu_seqlens_q, scale, max_q_len, split_keys):
    (num_tokens, num_heads, head_dim), (_, num_kv_heads, page_size, _) = q.shape, k_pages.shape
    num_seqs, group = len(context_lens), num_heads // num_kv_heads
    longest = max_q_len or ceil_div(num_tokens, num_seqs)
    tile = choose_tile(head_dim, q.dtype, group, longest, target_of(q))
    block_q = tile["BLOCK_M"] // group
    capacity = block_tables.shape[1] * page_size  # no context is longer; how long each is, the GPU alone knows
    if split_keys is None:
        tiles = max(num_seqs, ceil_div(num_tokens, block_q)) * num_kv_heads
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        short = takes_short_tile(q.dtype, group, longest)
        split_keys = choose_split(capacity, tiles, processors, short, partial_bytes=4 * q.numel())
    split_keys = round_up(min(split_keys, capacity), tile["BLOCK_N"])
    num_splits = min(ceil_div(capacity, split_keys), MAX_SPLITS) if capacity else 1
    split = num_splits > 1
    partial = q.new_empty((num_splits, *q.shape), dtype=torch.float32) if split else out
    lse = q.new_empty((num_splits, num_tokens, num_heads) if split else 0, dtype=torch.float32)
    launch(
        attend, (num_tokens // block_q + num_seqs, num_kv_heads, num_splits), partial, lse, q, k_pages, v_pages,
        block_tables, context_lens, cu_seqlens_q, scale * math.log2(math.e), num_tokens, num_seqs, split_keys,
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], block_tables.stride(0),
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, SPLIT=split, UPCAST=upcasts(q.dtype), **tile,
    )  # fmt: skip
    if split:
        launch(
            merge, num_tokens * num_heads, out, partial, lse, num_splits, head_dim, triton.next_power_of_2(num_splits)
        )
