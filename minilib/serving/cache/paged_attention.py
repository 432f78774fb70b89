"""Attention for one step of the engine: stores the new keys and values in their slots, then reads through page tables.

On a GPU that is the kernel in minilib/kernels/paged_attention/, which walks the tables itself. On a CPU it depends on
what a sequence brings:

    a prompt from its first token on      attend to its own keys and values, which are there side by side
    several tokens behind others          gather the pages of the sequence side by side, attend
    one token (decode)                    walk the page tables in compiled code (serving/cpu/attention.py), or in plain
                                          torch gather the pages of as many sequences as fit into the caches

No result depends on a slot that its sequence does not own, whatever that slot holds: a masked key has the weight 0,
but 0 · NaN is NaN. Kernels do not read such slots. Where pages are gathered for several sequences, the unwritten end of
a sequence's last page, which is its own since this step writes to that page, is filled with zeros, and short tables are
padded with a page of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.mechanisms.paging import PageTable
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.sequences import token_slices

GATHER_BYTES = 8 * 2**20  # keys and values brought side by side at once: what a CPU's caches hold


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
        compiled: store and decode in compiled code (fp32 on a CPU), not in plain torch.
        most_pages: of a table that decodes in compiled code and will be filled in anew; as many as it has if left out.
    """

    def __init__(self, cache: PagedCache, work: list[Work], compiled: bool = False, most_pages: int = 0) -> None:
        self.layers = list(zip(cache.k.unbind(), cache.v.unbind(), strict=True))
        tokens = token_slices([entry.num_queries for entry in work])
        entries = [(at, entry.table) for at, entry in zip(tokens, work, strict=True)]
        slots = new_slots(work)
        if compiled:
            # Here, so that an engine without it never loads the compiler: it takes 100 MiB.
            from minilib.serving.cpu.attention import CompiledStore, empty_like

            self.store, self.empty = CompiledStore(slots), empty_like
        else:
            self.store, self.empty = PlainStore(cache, slots), torch.empty_like
        self.parts = [_on_gpu(cache, entries)] if cache.k.is_cuda else _on_cpu(cache, entries, compiled, most_pages)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.layers[layer]
        self.store(k, v, keys, values)
        out = self.empty(q)
        for part in self.parts:
            part(out, q, k, v, keys, values)
        return out


Entry = tuple[slice, PageTable]  # the tokens of a sequence among those of the step, the last of its table


def new_slots(work: list[Work]) -> Tensor:
    """The slots that the new tokens go to, counted through all pages of the pool: (tokens,) int64 on the CPU."""
    slots = []
    for table, count in ((entry.table, entry.num_queries) for entry in work):
        frames, size = table.frames, table.page_size
        slots += [frames[at // size] * size + at % size for at in range(table.length - count, table.length)]
    return torch.tensor(slots)


class PlainStore:
    """Writes new keys and values into their slots.

    Args:
        cache: where keys and values are.
        slots: see `new_slots`.
    """

    def __init__(self, cache: PagedCache, slots: Tensor) -> None:
        page, place = np.divmod(slots.numpy(), cache.page_size)
        self.rows = torch.from_numpy(_rows(cache, page, place)).to(cache.k.device)

    def __call__(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        head_dim = k.shape[-1]
        keys.view(-1, head_dim).index_copy_(0, self.rows, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self.rows, v.reshape(-1, head_dim))


def _rows(cache: PagedCache, page: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The rows of these slots, if every (page, head, place) is a row of its own: slot by slot, head by head."""
    heads = cache.config.num_kv_heads
    return ((page[:, None] * heads + np.arange(heads)) * cache.page_size + place[:, None]).ravel()


def _on_gpu(cache: PagedCache, entries: list[Entry]) -> Callable[..., None]:
    """All sequences, by the kernel."""
    # Here, so that serving on a CPU never loads Triton: it takes 70 MiB.
    from minilib.kernels.paged_attention import paged_attention

    tables = np.zeros((len(entries), max(len(table.frames) for _, table in entries)), dtype=np.int32)
    for row, (_, table) in zip(tables, entries, strict=True):
        row[: len(table.frames)] = table.frames
    arrays = (
        tables,
        np.array([table.length for _, table in entries], dtype=np.int32),
        np.array([0, *(at.stop for at, _ in entries)], dtype=np.int32),
    )
    block_tables, context_lens, cu_seqlens_q = (torch.from_numpy(array).to(cache.k.device) for array in arrays)
    longest = max(at.stop - at.start for at, _ in entries)

    def attend(out: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        out[:] = paged_attention(q, keys, values, block_tables, context_lens, cu_seqlens_q, max_q_len=longest)

    return attend


def _on_cpu(cache: PagedCache, entries: list[Entry], compiled: bool, most_pages: int) -> list[Callable[..., None]]:
    """What attends for some of the tokens each: sequences with several new ones, and those that decode."""
    several, one = [], []
    for at, table in entries:
        (one if at.stop - at.start == 1 else several).append((at, table))
    if not compiled:
        return [
            *(Prompt(cache, *entry) for entry in several),
            *(Gathered(cache, group) for group in _divide(cache, one)),
        ]
    from minilib.serving.cpu.attention import CompiledDecode, CompiledPrompt

    prompts = [Prompt(cache, at, table, CompiledPrompt(table, at.stop - at.start)) for at, table in several]
    return [*prompts, CompiledDecode([(at.start, table) for at, table in one], most_pages)] if one else prompts


def _divide(cache: PagedCache, decodes: list[Entry]) -> list[list[Entry]]:
    """Sequences of like length side by side, so that few are padded, and no more at once than caches hold."""
    groups: list[list[Entry]] = []
    longest = 0
    layer_bytes = cache.page_bytes // cache.config.num_layers
    for member in sorted(decodes, key=lambda member: -len(member[1].frames)):
        if not groups or (len(groups[-1]) + 1) * longest * layer_bytes > GATHER_BYTES:
            groups.append([])
            longest = len(member[1].frames)
        groups[-1].append(member)
    return groups


class Prompt:
    """Several tokens of one sequence: they attend to what came before them and to each other.

    Args:
        cache: where keys and values are.
        tokens: their place among the step's tokens.
        table: of the sequence.
        compiled: does it for keys and values that are finite, if there is one.
    """

    def __init__(self, cache: PagedCache, tokens: slice, table: PageTable, compiled: Callable | None = None) -> None:
        self.tokens, self.length, self.compiled = tokens, table.length, compiled
        queries = tokens.stop - tokens.start
        self.seen = range(table.length - queries + 1, table.length + 1)  # keys, by each query
        self.pages = torch.tensor(table.frames) if queries < table.length else None
        self.dtype = cache.k.dtype

    @cached_property
    def mask(self) -> Tensor | None:
        """(queries, slots); None if there are no slots but those of the queries."""
        if self.pages is None:
            return None
        return _mask(np.arange(self.length) >= np.array(self.seen)[:, None], self.dtype)

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        if self.compiled is not None and self.compiled(out[self.tokens], q[self.tokens], keys, values):
            return
        if self.pages is None:
            k, v = (x[None, self.tokens].transpose(1, 2) for x in (k, v))
        else:
            k, v = (self._gather(pages) for pages in (keys, values))
        out[self.tokens] = self._attend(q[None, self.tokens].transpose(1, 2), k, v)[0].transpose(0, 1)

    def _gather(self, pages: Tensor) -> Tensor:
        """(1, kv_heads, slots, head_dim)."""
        return pages[self.pages].transpose(0, 1).flatten(1, 2)[None, :, : self.length]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = partial(F.scaled_dot_product_attention, enable_gqa=True)
        if (k.sum(dtype=torch.float64) + v.sum(dtype=torch.float64)).isfinite():
            return attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        # A key that is not finite would reach the queries before it, whose pages other requests may come to share.
        one_by_one = zip(q.split(1, dim=2), self.seen, strict=True)
        return torch.cat([attention(query, k[:, :, :seen], v[:, :, :seen]) for query, seen in one_by_one], dim=2)


class Gathered:
    """Several sequences with one query each: pages brought side by side, then attention over contiguous keys.

    Args:
        cache: where keys and values are; the unwritten slots of each last page are filled with zeros.
        members: the sequences, the longest first.

    Attributes:
        rows: (B, kv_heads, pages) int64, where each page of each head is, counted in pages of one head.
        mask: (B, 1, 1, slots), −inf where a query must not look; with three dimensions torch takes its slow path.
    """

    def __init__(self, cache: PagedCache, members: list[Entry]) -> None:
        self.tokens = torch.tensor([at.start for at, _ in members])
        tables = np.zeros((len(members), len(members[0][1].frames)), dtype=np.int64)
        for row, (_, table) in zip(tables, members, strict=True):
            row[:] = table.frames[0]
            row[: len(table.frames)] = table.frames
        heads = np.arange(cache.config.num_kv_heads)[None, :, None]
        self.rows = torch.from_numpy(tables[:, None, :] * len(heads[0]) + heads)
        lengths = np.array([table.length for _, table in members])
        hidden = np.arange(tables.shape[1] * cache.page_size) >= lengths[:, None]
        self.mask = _mask(hidden[:, None, None], cache.k.dtype)
        unwritten = torch.from_numpy(_rows_of_unwritten(cache, [table for _, table in members]))
        for pages in (cache.k, cache.v):
            pages.view(len(pages), -1, cache.config.head_dim).index_fill_(1, unwritten, 0)

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        k, v = (self._gather(pages) for pages in (keys, values))
        q = q[self.tokens].unflatten(1, (k.shape[1], -1))  # queries that share keys are queries of one head
        out[self.tokens] = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).flatten(1, 2)

    def _gather(self, pages: Tensor) -> Tensor:
        """(B, kv_heads, slots, head_dim)."""
        num_pages, heads, page_size, head_dim = pages.shape
        gathered = pages.view(num_pages * heads, page_size * head_dim).index_select(0, self.rows.view(-1))
        return gathered.view(*self.rows.shape[:2], -1, head_dim)


def _rows_of_unwritten(cache: PagedCache, tables: list[PageTable]) -> np.ndarray:
    """The slots behind each sequence's last token in its last page."""
    last = np.array([table.frames[-1] for table in tables])
    used = np.array([table.length - (len(table.frames) - 1) * cache.page_size for table in tables])
    sequence, place = np.nonzero(np.arange(cache.page_size) >= used[:, None])
    return _rows(cache, last[sequence], place)


def _mask(hidden: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
