"""Attention over the pages of a KV cache in compiled code: what a step of the engine calls, layer after layer.

One token of a sequence walks its page table, page by page, with the running softmax of chapter 03: nothing is gathered
and no mask is made. Several tokens of a sequence share its keys and values, which are brought into panels once a layer
and multiplied like matrices. No slot is read that the sequence has not written, and no other sequence.
"""

from __future__ import annotations

import torch
from numba import get_num_threads
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.paging import PageTable
from minilib.serving.cpu.attention_kernels import attend_to_panels, into_panels
from minilib.serving.cpu.machine_code import WIDTH, follow_threads_of_torch
from minilib.serving.cpu.tape import Kernel, address, call_kernel, room, room_for_product


def empty_like(q: Tensor) -> Tensor:
    """Room for the result of attention, as the product that follows likes to read it."""
    return room_for_product(*q.shape)


class CompiledStore:
    """Writes new keys and values into their slots.

    Args:
        slots: (tokens,) int64, counted through all pages of the pool.
    """

    def __init__(self, slots: Tensor) -> None:
        follow_threads_of_torch()
        self.slots = slots

    def __call__(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        _, heads, page_size, head_dim = keys.shape
        new = (address(k), k.stride(0), address(v), v.stride(0))
        sizes = (len(k), heads, head_dim, page_size)
        call_kernel(Kernel.STORE, *sizes, address(self.slots), *new, address(keys), address(values))


class CompiledDecode:
    """Attention of sequences with one new token each.

    Args:
        members: number of the token and page table of each.
        most_pages: room for so many pages a sequence, for tables that will be filled in anew; as they are if left out.
    """

    def __init__(self, members: list[tuple[int, PageTable]], most_pages: int = 0) -> None:
        most_pages = max(most_pages, *(len(table.frames) for _, table in members))
        self.rows = torch.zeros(len(members), 2 + most_pages, dtype=torch.int64)
        self.fill(members)

    def fill(self, members: list[tuple[int, PageTable]]) -> None:
        """Take the tables as they are now."""
        for row, (token, table) in zip(self.rows.numpy(), members, strict=True):
            row[: 2 + len(table.frames)] = token, table.length, *table.frames

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        _, kv_heads, page_size, head_dim = keys.shape
        parts = 1 if len(self.rows) >= 4 * get_num_threads() else kv_heads
        sizes = (len(self.rows), kv_heads, parts, q.shape[1] // kv_heads, head_dim, page_size)
        tables = (address(self.rows), self.rows.shape[1] - 2)
        pages = (address(keys), address(values))
        of_out = (address(out), out.stride(0))
        call_kernel(Kernel.ATTEND, *sizes, *tables, address(q), q.stride(0), *pages, *of_out, number=head_dim**-0.5)


class CompiledPrompt:
    """Attention of several tokens of one sequence, to what came before them and to each other.

    Args:
        table: of the sequence.
        num_queries: the last slots of the table.
    """

    def __init__(self, table: PageTable, num_queries: int) -> None:
        self.pages, self.length, self.num_queries = torch.tensor(table.frames), table.length, num_queries
        self.panels: tuple[Tensor, Tensor] | None = None  # of one layer after the other

    def __call__(self, out: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """False, and nothing is computed, if a key or a value is not finite: it would reach the queries before it."""
        _, kv_heads, page_size, head_dim = keys.shape
        if self.panels is None:
            shapes = (self.length, head_dim), (head_dim, self.length)
            self.panels = tuple(room(kv_heads, ceil_div(n, WIDTH), k, WIDTH).zero_() for n, k in shapes)
        k_panels, v_panels = (address(panels) for panels in self.panels)
        sizes = (kv_heads, head_dim, page_size, self.length)
        into_panels(*sizes, address(self.pages), address(keys), address(values), k_panels, v_panels)
        if not all(panels.sum(dtype=torch.float64).isfinite() for panels in self.panels):
            return False
        heads = q.shape[1]
        of_q = (heads, heads // kv_heads, head_dim, address(q), q.stride(0))
        of_out = (address(out), out.stride(0))
        attend_to_panels(self.num_queries, self.length, *of_q, k_panels, v_panels, *of_out, head_dim**-0.5)
        return True
