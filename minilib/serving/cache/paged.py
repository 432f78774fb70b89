"""Keys and values in pages: the storage behind page tables (paged_attention.py reads it).

    k, v of one layer     (num_pages, num_kv_heads, page_size, head_dim)
    slot of token t       page table of its sequence: t // page_size → page, t % page_size → place in it

One page number stands for that page in every layer, so a sequence has one table, and forking, swapping and freeing it
never look at layers.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.paging import Copy, FramePool, PageTable
from minilib.model.config import ModelConfig

HOST_SHARE, GPU_SHARE = 0.5, 0.9  # of the memory that is free when a pool is sized; a host has other work to do

logger = logging.getLogger(__name__)


class CacheTooLarge(MemoryError):
    """The pages do not fit into memory; the message has the numbers."""


class PagedCache:
    """A pool of pages and the tensors behind them.

    The tensors are not initialised: memory of the host is taken page by page, when tokens are first written to it.

    Args:
        config: of the model whose keys and values are kept.
        num_pages: pages on the device; see `default_num_pages`.
        page_size: tokens in a page.
        num_swap_pages: pages in host memory that sequences can be moved to.
        dtype: of keys and values.
        device: where the pages are.
        pool_type: makes both pools, from their sizes.

    Raises:
        ValueError: if page_size or num_pages is no whole number ≥ 1, or num_swap_pages none ≥ 0.
        CacheTooLarge: if there is less memory than the pages take.

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
        pool_type: Callable[[int], FramePool] = FramePool,
    ) -> None:
        check_whole("page_size", page_size, 1)
        check_whole("num_pages", num_pages, 1)
        check_whole("num_swap_pages", num_swap_pages)
        self.config, self.page_size = config, page_size
        self.pool, self.swap_pool = pool_type(num_pages), pool_type(num_swap_pages)
        page = (config.num_kv_heads, page_size, config.head_dim)
        self.k, self.v = _pages("num_pages", config.num_layers, num_pages, page, dtype, torch.device(device))
        host = torch.device("meta" if self.k.is_meta else "cpu")
        self.swap_k, self.swap_v = _pages("num_swap_pages", config.num_layers, num_swap_pages, page, dtype, host)

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


def default_num_pages(
    config: ModelConfig, page_size: int, max_sequences: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Pages for as many full sequences as may run at once, but no more than a share of the memory that is free.

    Raises:
        ValueError: if page_size is no whole number ≥ 1.
        CacheTooLarge: if not even one page fits.
    """
    check_whole("page_size", page_size, 1)
    page_bytes = config.kv_values_per_token * page_size * dtype.itemsize
    pages_per_sequence = ceil_div(config.max_position, page_size)
    free = free_bytes(device)
    fit = int(free * (GPU_SHARE if device.type == "cuda" else HOST_SHARE)) // page_bytes
    if not fit:
        raise CacheTooLarge(f"a page takes {page_bytes:,} bytes, and {free:,} are free; choose a smaller page_size")
    num_pages = min(fit, max_sequences * pages_per_sequence)
    logger.info(
        "KV cache: num_pages=%d of %d tokens, %d bytes; %d sequences of %d tokens fit, %d may run; %d bytes were free",
        num_pages, page_size, num_pages * page_bytes, num_pages // pages_per_sequence, config.max_position,
        max_sequences, free,
    )  # fmt: skip
    if num_pages < pages_per_sequence:
        logger.warning("the KV cache holds no sequence of max_position = %d tokens", config.max_position)
    return num_pages


def free_bytes(device: torch.device) -> int:
    """Bytes that a device, or the host, can still give; the meta device keeps shapes alone, so it never runs out."""
    if device.type == "meta":
        return sys.maxsize
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _pages(
    name: str, num_layers: int, num_pages: int, page: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values of so many pages, (num_layers, num_pages, *page) each, with whatever the memory holds."""
    shape = (num_layers, num_pages, *page)
    needed, free = 2 * math.prod(shape) * dtype.itemsize, free_bytes(device)
    message = f"{name}={num_pages} takes {needed:,} bytes on {device}, and {free:,} are free; give fewer pages"
    if needed > free:
        raise CacheTooLarge(message)
    try:
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # what torch raises on any device
        raise CacheTooLarge(message) from error


def _copy(source: Tensor, target: Tensor, copies: list[Copy]) -> None:
    if copies:
        sources = torch.tensor([copy.source for copy in copies], device=source.device)
        targets = torch.tensor([copy.target for copy in copies], device=target.device)
        target.index_copy_(1, targets, source.index_select(1, sources).to(target.device))
