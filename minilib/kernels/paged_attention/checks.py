"""What paged attention refuses: tensors that do not fit one another and, where that costs no wait, what they hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minilib.kernels.paged_attention.tiles import HEAD_DIMS, max_group


def check_tensors(tensors: tuple[Tensor, ...], dtypes) -> None:
    """What shapes, dtypes, devices and strides tell, without a look at what the tensors hold."""
    q, k_pages, v_pages, *integers = tensors
    names = ("q", "k_pages", "v_pages", "block_tables", "context_lens", "cu_seqlens_q")
    for name, x, dims in zip(names, tensors, (3, 4, 4, 2, 1, 1), strict=True):
        allowed = dtypes if name == "q" else (q.dtype,) if dims == 4 else (torch.int32,)
        if not isinstance(x, Tensor) or x.dtype not in allowed:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, allowed))}, got {got}: convert it")
        if x.dim() != dims or (x.shape[-1] > 1 and x.stride(-1) != 1) or x.device != q.device:
            got = f"shape {tuple(x.shape)}, strides {x.stride()}, {x.device}: .view(), .contiguous() or .to() mends it"
            raise ValueError(f"{name} must have {dims} dimensions, stride 1 in the last, on {q.device}, got {got}")
    (_, heads, head_dim), (_, kv_heads, page_size, _) = q.shape, k_pages.shape
    if k_pages.shape != v_pages.shape or not page_size or head_dim != k_pages.shape[-1] or head_dim not in HEAD_DIMS:
        wanted = f"(pages, kv heads, page_size, head_dim) alike, with q's head_dim, one of {HEAD_DIMS}: pad with zeros"
        got = f"k_pages {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)}, q {tuple(q.shape)}"
        raise ValueError(f"k_pages and v_pages must be {wanted}; got {got}")
    limit = max_group(head_dim, q.dtype)
    if not kv_heads or not heads or heads % kv_heads or heads > limit * kv_heads:
        raise ValueError(f"q's heads must be 1 to {limit} times the pages', got {heads}, {kv_heads}: repeat some")
    rows = [len(x) for x in integers]
    if rows != [rows[0], rows[0], rows[0] + 1]:
        raise ValueError(f"block_tables, context_lens, cu_seqlens_q must have n, n, n + 1 rows, got {rows}: cut or pad")


def check_values(q, k_pages, block_tables, context_lens, cu_seqlens_q) -> tuple[list[int], list[int]]:
    """Check what the integer tensors hold; cu_seqlens_q and context_lens as lists."""
    starts, contexts, page_size = cu_seqlens_q.tolist(), context_lens.tolist(), k_pages.shape[2]
    if starts[0] != 0 or sorted(starts) != starts or starts[-1] > len(q):
        raise ValueError(f"cu_seqlens_q must climb from 0 to at most num_tokens = {len(q)}, got {starts}")
    for table, context in zip(block_tables.tolist(), contexts, strict=True):
        pages = table[: math.ceil(context / page_size)]
        if not 0 <= context <= len(table) * page_size or any(not 0 <= page < len(k_pages) for page in pages):
            wanted = f"as many pages from 0 to {len(k_pages) - 1} as hold the {context} tokens of context_lens"
            raise ValueError(f"a row of block_tables must begin with {wanted}, {page_size} each, got {table}")
    return starts, contexts
