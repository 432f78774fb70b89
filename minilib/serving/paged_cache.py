"""Keys and values in pages: the storage, and attention that finds its way through page tables.

    k, v of one layer     (num_pages, num_kv_heads, page_size, head_dim)
    slot of token t       page table of its sequence: t // page_size → page, t % page_size → place in it

One page number stands for that page in every layer, so a sequence has one table, and forking, swapping and freeing it
never look at layers.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.mechanisms.paging import Copy, PagePool, PageTable
from minilib.model.config import ModelConfig

GATHER_BYTES = 8 * 2**20  # keys and values of sequences attended to at once: what a CPU's caches hold


@dataclass(frozen=True)
class Work:
    """What one step computes for one sequence: the last `num_queries` slots of its table."""

    table: PageTable
    num_queries: int


class PagedCache:
    """A pool of pages and the tensors behind them.

    Args:
        config: of the model whose keys and values are kept.
        num_pages: pages on the device.
        page_size: tokens in a page.
        num_swap_pages: pages in host memory that sequences can be moved to.
        dtype: of keys and values.
        device: where the pages are.

    Raises:
        ValueError: if page_size or num_pages is below 1.

    Cost: 2 · num_layers · num_kv_heads · head_dim · page_size numbers a page.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int = 16,
        num_swap_pages: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {page_size!r}")
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages!r}")
        self.config, self.page_size = config, page_size
        self.pool, self.swap_pool = PagePool(num_pages), PagePool(num_swap_pages)
        page = (config.num_kv_heads, page_size, config.head_dim)
        # zeros: a slot that was never written is masked, but 0 · NaN would still be NaN
        self.k, self.v = (torch.zeros(config.num_layers, num_pages, *page, dtype=dtype, device=device) for _ in "kv")
        self.swap_k, self.swap_v = (torch.zeros(config.num_layers, num_swap_pages, *page, dtype=dtype) for _ in "kv")

    @property
    def num_slots(self) -> int:
        """Tokens that the pool holds when every page is full."""
        return self.pool.num_pages * self.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers, keys and values."""
        return self.config.kv_values_per_token * self.page_size * self.k.element_size()

    def new_table(self) -> PageTable:
        """An empty table for one sequence."""
        return PageTable(self.pool, self.page_size)

    def copy(self, copies: list[Copy]) -> None:
        """Copy pages within the pool, before sequences write to their own copies."""
        _copy(self.k, self.k, copies)
        _copy(self.v, self.v, copies)

    def swap_out(self, table: PageTable) -> int:
        """Move a sequence's pages to host memory; returns their number.

        Raises:
            OutOfPages: if the swap pool is too full; nothing was moved.
        """
        copies = table.move(self.swap_pool)
        _copy(self.k, self.swap_k, copies)
        _copy(self.v, self.swap_v, copies)
        return len(copies)

    def swap_in(self, table: PageTable) -> int:
        """Move a sequence's pages back to the device; returns their number.

        Raises:
            OutOfPages: if the pool is too full; nothing was moved.
        """
        copies = table.move(self.pool)
        _copy(self.swap_k, self.k, copies)
        _copy(self.swap_v, self.v, copies)
        return len(copies)

    def attention(self, work: list[Work]) -> PagedAttention:
        """Attention for one step; its tokens are those of `work`, one sequence after another."""
        return PagedAttention(self, work)


class PagedAttention:
    """One step's attention: stores the new keys and values in their slots, then attends through the page tables.

    Everything that depends on page tables alone is computed here, once for all layers. Sequences with one query each
    (decoding) are attended to together, as many as fit into `GATHER_BYTES`, longest first; the others (prefill behind
    whatever is cached) one by one.

    Args:
        cache: where keys and values are.
        work: what the step computes; each table has grown by its queries already.
    """

    def __init__(self, cache: PagedCache, work: list[Work]) -> None:
        self.cache = cache
        self.device = cache.k.device
        self.slots = self._on_device(np.concatenate([self._rows_of_new(entry) for entry in work]))
        ends = np.cumsum([entry.num_queries for entry in work])
        decodes = [(int(end) - 1, entry.table) for end, entry in zip(ends, work, strict=True) if entry.num_queries == 1]
        self.groups = [self._group(members) for members in self._divide(decodes)]
        self.prefills = [
            self._prefill(int(end) - entry.num_queries, int(end), entry)
            for end, entry in zip(ends, work, strict=True)
            if entry.num_queries > 1
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys.view(-1, head_dim).index_copy_(0, self.slots, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self.slots, v.reshape(-1, head_dim))
        out = torch.empty_like(q)
        for tokens, rows, mask in self.groups:
            out[tokens] = _attend_one_query(q[tokens], _gather(keys, rows), _gather(values, rows), mask)
        for tokens, rows, mask in self.prefills:
            out[tokens] = _attend_many_queries(q[tokens], _gather(keys, rows), _gather(values, rows), mask)
        return out

    def _rows_of_new(self, entry: Work) -> np.ndarray:
        """Where the new tokens go, if every (page, head, place) is a row of its own: token by token, head by head."""
        size, heads = self.cache.page_size, self.cache.config.num_kv_heads
        slot = np.arange(entry.table.num_slots - entry.num_queries, entry.table.num_slots)
        page = np.asarray(entry.table.pages[slot[0] // size :])[slot // size - slot[0] // size]
        return ((page[:, None] * heads + np.arange(heads)) * size + slot[:, None] % size).ravel()

    def _divide(self, decodes: list[tuple[int, PageTable]]) -> list[list[tuple[int, PageTable]]]:
        """Sequences of like length side by side, so that few are padded, and no more at once than caches hold."""
        groups: list[list[tuple[int, PageTable]]] = []
        longest = 0
        for member in sorted(decodes, key=lambda member: -len(member[1].pages)):
            layer_bytes = self.cache.page_bytes // self.cache.config.num_layers
            if not groups or (len(groups[-1]) + 1) * longest * layer_bytes > GATHER_BYTES:
                groups.append([])
                longest = len(member[1].pages)
            groups[-1].append(member)
        return groups

    def _group(self, members: list[tuple[int, PageTable]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token numbers (B,), rows of pages (B, heads, pages) and mask (B, 1, slots) of sequences with one query."""
        tables = np.zeros((len(members), len(members[0][1].pages)), dtype=np.int64)
        for row, (_, table) in zip(tables, members, strict=True):
            row[: len(table.pages)] = table.pages
        lengths = np.array([table.num_slots for _, table in members])
        hidden = np.arange(tables.shape[1] * self.cache.page_size) >= lengths[:, None]
        tokens = self._on_device(np.array([token for token, _ in members]))
        return tokens, self._rows_of_pages(tables), self._mask(hidden[:, None])

    def _prefill(self, first: int, end: int, entry: Work) -> tuple[slice, Tensor, Tensor]:
        """Token slice, rows of pages (1, heads, pages) and mask (1, queries, slots) of a sequence with many queries."""
        tables = np.array([entry.table.pages], dtype=np.int64)
        position = np.arange(entry.table.num_slots - entry.num_queries, entry.table.num_slots)
        hidden = np.arange(tables.shape[1] * self.cache.page_size) > position[:, None]
        return slice(first, end), self._rows_of_pages(tables), self._mask(hidden[None])

    def _rows_of_pages(self, tables: np.ndarray) -> Tensor:
        heads = self.cache.config.num_kv_heads
        return self._on_device(tables[:, None, :] * heads + np.arange(heads)[None, :, None])

    def _mask(self, hidden: np.ndarray) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.cache.k.dtype, device=self.device)
        return mask.masked_fill_(self._on_device(hidden), -torch.inf)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _gather(pages: Tensor, rows: Tensor) -> Tensor:
    """Pages of one layer, brought side by side: (B, heads, slots, head_dim)."""
    num_pages, heads, page_size, head_dim = pages.shape
    gathered = pages.view(num_pages * heads, page_size * head_dim).index_select(0, rows.view(-1))
    return gathered.view(*rows.shape[:2], -1, head_dim)


def _attend_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, num_heads, head_dim) against k and v (B, kv_heads, slots, head_dim); a group of queries shares its keys."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[:, None]).flatten(1, 2)


def _attend_many_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (queries, num_heads, head_dim) against k and v (1, kv_heads, slots, head_dim)."""
    mixed = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask[:, None], enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _copy(source: Tensor, target: Tensor, copies: list[Copy]) -> None:
    if copies:
        sources = torch.tensor([copy.source for copy in copies], device=source.device)
        targets = torch.tensor([copy.target for copy in copies], device=target.device)
        target.index_copy_(1, targets, source.index_select(1, sources).to(target.device))
