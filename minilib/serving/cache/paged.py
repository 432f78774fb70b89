"""Keys and values in pages: the storage behind page tables (paged_attention.py reads it).

    k, v of one layer     (num_pages, num_kv_heads, page_size, head_dim)
    slot of token t       page table of its sequence: t // page_size → page, t % page_size → place in it

One page number stands for that page in every layer, so a sequence has one table, and forking, swapping and freeing it
never look at layers.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.mechanisms.paging import Copy, FramePool, PageTable
from minilib.model.config import ModelConfig


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
        self.pool, self.swap_pool = FramePool(num_pages), FramePool(num_swap_pages)
        page = (config.num_kv_heads, page_size, config.head_dim)
        # zeros: a slot that was never written is masked, but 0 · NaN would still be NaN
        self.k, self.v = (torch.zeros(config.num_layers, num_pages, *page, dtype=dtype, device=device) for _ in "kv")
        self.swap_k, self.swap_v = (torch.zeros(config.num_layers, num_swap_pages, *page, dtype=dtype) for _ in "kv")

    @property
    def num_slots(self) -> int:
        """Tokens that the pool holds when every page is full."""
        return self.pool.num_frames * self.page_size

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
            OutOfFrames: if the swap pool is too full; nothing was moved.
        """
        copies = table.move(self.swap_pool)
        _copy(self.k, self.swap_k, copies)
        _copy(self.v, self.swap_v, copies)
        return len(copies)

    def swap_in(self, table: PageTable) -> int:
        """Move a sequence's pages back to the device; returns their number.

        Raises:
            OutOfFrames: if the pool is too full; nothing was moved.
        """
        copies = table.move(self.pool)
        _copy(self.swap_k, self.k, copies)
        _copy(self.swap_v, self.v, copies)
        return len(copies)


def _copy(source: Tensor, target: Tensor, copies: list[Copy]) -> None:
    if copies:
        sources = torch.tensor([copy.source for copy in copies], device=source.device)
        targets = torch.tensor([copy.target for copy in copies], device=target.device)
        target.index_copy_(1, targets, source.index_select(1, sources).to(target.device))
