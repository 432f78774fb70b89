"""Attention for one step of the engine: stores the new keys and values in their slots, then reads through page tables.

On a GPU that is the kernel in minilib/kernels/paged_attention/, which walks the tables itself. On a CPU there are
three ways, all in plain torch, because what is fast depends on how much there is to read:

    many queries a sequence (prefill)     gather its pages side by side, attend, one sequence at a time
    one query, few pages                  gather the pages of as many sequences as fit into the caches, attend together
    one query, most of the pool's pages   leave pages where they are: bring each its sequence's query, merge the parts

The last is the softmax that can be merged (chapter 03): each page gives a part, and parts of one sequence add up.

No result depends on a slot that its sequence does not own, whatever that slot holds: a masked key has the weight 0,
but 0 · NaN is NaN. The kernel does not read such slots. On a CPU the unwritten end of a sequence's last page, which is
its own since this step writes to that page, is filled with zeros, and short tables are padded with a page of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.mechanisms.paging import PageTable
from minilib.serving.cache.paged import PagedCache

GATHER_BYTES = 8 * 2**20  # keys and values brought side by side at once: what a CPU's caches hold
IN_PLACE_PAGES = 256  # with fewer, moving the queries and merging costs more than moving the pages


@dataclass(frozen=True)
class Work:
    """What one step computes for one sequence: the last `num_queries` slots of its table."""

    table: PageTable
    num_queries: int


class PagedAttention:
    """Attention for one step; its tokens are those of `work`, one sequence after another.

    What depends on the page tables alone is computed here, once for all layers.

    Args:
        cache: where keys and values are.
        work: what the step computes; each table has grown by its queries already.
    """

    def __init__(self, cache: PagedCache, work: list[Work]) -> None:
        self.cache = cache
        self.slots = torch.from_numpy(_rows_of_new(cache, work)).to(cache.k.device)
        if not cache.k.is_cuda:
            unwritten = torch.from_numpy(_rows_of_unwritten(cache, work))
            for pages in (cache.k, cache.v):
                pages.view(len(pages), -1, cache.config.head_dim).index_fill_(1, unwritten, 0)
        self.layers = list(zip(cache.k.unbind(), cache.v.unbind(), strict=True))
        ends = np.cumsum([entry.num_queries for entry in work])
        self.parts = _on_gpu(cache, work, ends) if cache.k.is_cuda else _on_cpu(cache, work, ends)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        keys, values = self.layers[layer]
        keys.view(-1, head_dim).index_copy_(0, self.slots, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self.slots, v.reshape(-1, head_dim))
        if len(self.parts) == 1 and isinstance(self.parts[0][0], slice):
            return self.parts[0][1](q, keys, values)
        out = torch.empty_like(q)
        for tokens, attend in self.parts:
            out[tokens] = attend(q[tokens], keys, values)
        return out


def _rows_of_new(cache: PagedCache, work: list[Work]) -> np.ndarray:
    """The slots that the new tokens go to."""
    size = cache.page_size
    new = [(entry.table, range(entry.table.length - entry.num_queries, entry.table.length)) for entry in work]
    page = np.array([table.frames[slot // size] for table, slots in new for slot in slots])
    place = np.array([slot % size for _, slots in new for slot in slots])
    return _rows(cache, page, place)


def _rows_of_unwritten(cache: PagedCache, work: list[Work]) -> np.ndarray:
    """The slots behind each sequence's last token in its last page."""
    last = np.array([entry.table.frames[-1] for entry in work])
    used = np.array([entry.table.length - (len(entry.table.frames) - 1) * cache.page_size for entry in work])
    sequence, place = np.nonzero(np.arange(cache.page_size) >= used[:, None])
    return _rows(cache, last[sequence], place)


def _rows(cache: PagedCache, page: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The rows of these slots, if every (page, head, place) is a row of its own: slot by slot, head by head."""
    heads = cache.config.num_kv_heads
    return ((page[:, None] * heads + np.arange(heads)) * cache.page_size + place[:, None]).ravel()


def _on_gpu(cache: PagedCache, work: list[Work], ends: np.ndarray) -> list[tuple]:
    # Here, so that serving on a CPU never loads Triton: it takes 70 MiB.
    from minilib.kernels.paged_attention import paged_attention

    tables = np.zeros((len(work), max(len(entry.table.frames) for entry in work)), dtype=np.int32)
    for row, entry in zip(tables, work, strict=True):
        row[: len(entry.table.frames)] = entry.table.frames
    arrays = (
        tables,
        np.array([entry.table.length for entry in work], dtype=np.int32),
        np.concatenate([[0], ends]).astype(np.int32),
    )
    block_tables, context_lens, cu_seqlens_q = (torch.from_numpy(array).to(cache.k.device) for array in arrays)
    longest = max(entry.num_queries for entry in work)

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return paged_attention(q, keys, values, block_tables, context_lens, cu_seqlens_q, max_q_len=longest)

    return [(slice(None), attend)]


def _on_cpu(cache: PagedCache, work: list[Work], ends: np.ndarray) -> list[tuple]:
    """(token numbers, function of their q and of the layer's pages) for every part of the step's tokens."""
    entries = list(zip(ends.tolist(), work, strict=True))
    decodes = [(end - 1, entry.table) for end, entry in entries if entry.num_queries == 1]
    prefills = [(end, entry) for end, entry in entries if entry.num_queries > 1]
    parts: list[tuple] = []
    in_place = InPlace.plan(cache, [table for _, table in decodes])
    if in_place:
        parts.append((_tokens(decodes), in_place))
    else:
        parts += [(_tokens(members), Gathered.decode(cache, members)) for members in _divide(cache, decodes)]
    parts += [(slice(end - entry.num_queries, end), Gathered.prefill(cache, entry)) for end, entry in prefills]
    return parts if len(parts) > 1 else [(slice(None), parts[0][1])] if _in_order(parts[0][0]) else parts


def _tokens(members: list[tuple[int, PageTable]]) -> Tensor:
    return torch.tensor([token for token, _ in members])


def _in_order(tokens: Tensor | slice) -> bool:
    return isinstance(tokens, slice) or bool((tokens[1:] > tokens[:-1]).all())


def _divide(cache: PagedCache, decodes: list[tuple[int, PageTable]]) -> list[list[tuple[int, PageTable]]]:
    """Sequences of like length side by side, so that few are padded, and no more at once than caches hold."""
    groups: list[list[tuple[int, PageTable]]] = []
    longest = 0
    layer_bytes = cache.page_bytes // cache.config.num_layers
    for member in sorted(decodes, key=lambda member: -len(member[1].frames)):
        if not groups or (len(groups[-1]) + 1) * longest * layer_bytes > GATHER_BYTES:
            groups.append([])
            longest = len(member[1].frames)
        groups[-1].append(member)
    return groups


@dataclass(frozen=True)
class Gathered:
    """Pages brought side by side, then attention over contiguous keys.

    Args:
        rows: (B, kv_heads, pages) int64, where each page of each head is, counted in pages of one head.
        mask: (B, 1, queries, slots), −inf where a query must not look; with three dimensions torch takes its slow path.
    """

    rows: Tensor
    mask: Tensor

    @classmethod
    def decode(cls, cache: PagedCache, members: list[tuple[int, PageTable]]) -> Gathered:
        """Several sequences with one query each, the longest first."""
        tables = np.zeros((len(members), len(members[0][1].frames)), dtype=np.int64)
        for row, (_, table) in zip(tables, members, strict=True):
            row[:] = table.frames[0]
            row[: len(table.frames)] = table.frames
        lengths = np.array([table.length for _, table in members])
        return cls._make(cache, tables, lengths[:, None])

    @classmethod
    def prefill(cls, cache: PagedCache, entry: Work) -> Gathered:
        """One sequence with several queries, the last of its slots."""
        table = entry.table
        visible = np.arange(table.length - entry.num_queries, table.length) + 1
        return cls._make(cache, np.array([table.frames], dtype=np.int64), visible[None])

    @classmethod
    def _make(cls, cache: PagedCache, tables: np.ndarray, visible: np.ndarray) -> Gathered:
        heads = np.arange(cache.config.num_kv_heads)[None, :, None]
        hidden = np.arange(tables.shape[1] * cache.page_size) >= visible[..., None]
        rows = torch.from_numpy(tables[:, None, :] * len(heads[0]) + heads)
        return cls(rows, _mask(hidden[:, None], cache.k.dtype))

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (tokens, num_heads, head_dim), keys and values of one layer → (tokens, num_heads, head_dim)."""
        batch, kv_heads, _ = self.rows.shape
        k, v = (self._gather(pages) for pages in (keys, values))
        if batch == q.shape[0]:  # queries that share keys are queries of one head, to read the keys once
            q, shape = q.unflatten(1, (kv_heads, -1)), q.shape
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).view(shape)
        q = q.transpose(0, 1)[None]
        if (k.sum(dtype=torch.float64) + v.sum(dtype=torch.float64)).isfinite():
            return _attend(q, k, v, self.mask)
        # A key that is not finite would reach the queries before it, whose pages other requests may come to share.
        masks = self.mask.split(1, dim=2)
        seen = [int((mask == 0).sum()) for mask in masks]
        one_by_one = zip(q.split(1, dim=2), masks, seen, strict=True)
        return torch.cat([_attend(q, k[:, :, :n], v[:, :, :n], mask[..., :n]) for q, mask, n in one_by_one])

    def _gather(self, pages: Tensor) -> Tensor:
        num_pages, heads, page_size, head_dim = pages.shape
        gathered = pages.view(num_pages * heads, page_size * head_dim).index_select(0, self.rows.view(-1))
        return gathered.view(*self.rows.shape[:2], -1, head_dim)


@dataclass(frozen=True)
class InPlace:
    """Pages stay where they are: each is attended to by its owner's query, and the parts are merged.

    Args:
        owner: (pages,) int64, the sequence that a page belongs to; `batch` for pages of nobody here.
        mask: (pages, 1, 1, page_size), −inf in slots that are not written yet.
        batch: sequences, with one query each.
    """

    owner: Tensor
    mask: Tensor
    batch: int

    @classmethod
    def plan(cls, cache: PagedCache, tables: list[PageTable]) -> InPlace | None:
        """None unless these sequences own most of the pages up to their last, each page by itself, and many."""
        pages = np.array([page for table in tables for page in table.frames], dtype=np.int64)
        if len(pages) < IN_PLACE_PAGES or 2 * len(pages) < pages.max() + 1:
            return None
        owner = np.full(pages.max() + 1, len(tables))
        owner[pages] = np.repeat(np.arange(len(tables)), [len(table.frames) for table in tables])
        if (owner < len(tables)).sum() < len(pages):
            return None  # a shared page would need two owners
        hidden = np.zeros((len(owner), cache.page_size), dtype=bool)
        used = np.array([table.length - (len(table.frames) - 1) * cache.page_size for table in tables])
        hidden[[table.frames[-1] for table in tables]] = np.arange(cache.page_size) >= used[:, None]
        return cls(torch.from_numpy(owner), _mask(hidden[:, None, None], cache.k.dtype), len(tables))

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (batch, num_heads, head_dim), keys and values of one layer → (batch, num_heads, head_dim)."""
        num_pages = len(self.owner)
        _, kv_heads, page_size, head_dim = keys.shape
        num_heads = q.shape[1]
        k, v = (pages[:num_pages].view(num_pages * kv_heads, page_size, head_dim) for pages in (keys, values))
        queries = (q * head_dim**-0.5).view(self.batch, -1).index_select(0, self.owner.clamp(max=self.batch - 1))
        scores = torch.bmm(queries.view(num_pages * kv_heads, -1, head_dim), k.transpose(1, 2))
        scores = scores.view(num_pages, kv_heads, -1, page_size).add_(self.mask).view(num_pages, num_heads, page_size)
        highest = q.new_full((self.batch + 1, num_heads), -torch.inf)
        highest.scatter_reduce_(0, self.owner[:, None].expand(-1, num_heads), scores.amax(-1), "amax")
        weights = scores.sub_(highest.index_select(0, self.owner)[..., None]).exp_()
        parts = torch.bmm(weights.view(num_pages * kv_heads, -1, page_size), v).view(num_pages, -1)
        mixed = q.new_zeros(self.batch + 1, num_heads * head_dim).index_add_(0, self.owner, parts)
        total = q.new_zeros(self.batch + 1, num_heads).index_add_(0, self.owner, weights.sum(-1))
        return mixed[:-1].view(q.shape) / total[:-1, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One sequence: (1, heads, queries, head_dim) → (queries, heads, head_dim)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _mask(hidden: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
