"""Cases of paged attention: pages in random order, everything else poisoned, and what SDPA makes of the same keys."""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn import functional as F

from tests.kernels.place import DTYPES

TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6, "fp16": 2e-3, "bf16": 1.6e-2}  # of 1 + |value|
B = 64  # keys a round at head_dim 16 in 16 bit, two rounds' worth in 32 bit: lengths around its multiples
BATCHES = {  # (query tokens, tokens in the cache) of each sequence
    "decode": [(1, B - 1), (1, B), (1, B + 1), (1, 2 * B - 1), (1, 2 * B), (1, 2 * B + 1)],
    "prefill": [(9, 9), (2, B - 1), (2, 2 * B)],
    "mixed": [(1, B), (0, 0), (5, B + 1), (0, 5), (1, 2 * B - 1), (1, 1)],
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
