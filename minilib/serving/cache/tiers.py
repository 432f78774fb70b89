"""A second tier for kept pages: host memory, and a file below it.

    the engine's pages ──leave──► host memory (frames of the swap pool) ──leave──► a file ──leave──► gone
            ▲                            │                                           │
            └──── come back, where that is priced cheaper than computing their tokens anew

A page has one name in every tier, the key of its chain, whatever the design of the index above. Host memory is that of
preemption by swap: a sequence that is moved there has the right of way. Who loses a page computes it anew, so a tier
that fails is a miss and nothing more.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minilib.kernels.workbench.dispatch import DTYPES
from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.paging import OutOfFrames
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine, NotOnThisMachine
from minilib.numbers.price import Cost, price
from minilib.serving.cache.keeping_pool import KeepingPool
from minilib.serving.cache.page_file import PageFile, PageName
from minilib.serving.cache.paged import PagedCache
from minilib.serving.step_cost import pair_flops, pairs_behind, product_flops


@dataclass(frozen=True)
class SecondTier:
    """Where pages go that leave the engine's own pool.

    Args:
        machine: prices whether a page comes back; None to bring back every page that is there.
        path: a file for pages that leave host memory; None for none.
        num_pages: pages in that file.

    Host memory is as large as the engine's `num_swap_pages`.

    Raises:
        TypeError: if the machine or the path is none.
        ValueError: if num_pages is no whole number, or 0 with a file, or more without one.
    """

    machine: Machine | None = None
    path: Path | str | None = None
    num_pages: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.path, Path | str | None):
            raise TypeError(f"path is a file's, got {self.path!r}")
        if not isinstance(self.machine, Machine | None):
            raise TypeError(f"machine is a Machine, got {self.machine!r}")
        check_whole("num_pages", self.num_pages, 0 if self.path is None else 1)
        if self.num_pages and self.path is None:
            raise ValueError(f"num_pages is for a file, and there is no path to one; got {self.num_pages!r}")


class Tiers:
    """Pages by name, in host memory and in a file.

    Args:
        cache: whose pages come here; its swap pool is a `KeepingPool`.
        model: whose keys and values they are.
        tier: where they go.

    Attributes:
        file: the file, if there is one.

    Raises:
        ValueError: if there is neither host memory nor a file.
        PageFileError, ValueError: as `PageFile`.
        NotOnThisMachine: if the machine lacks a figure that prices need.
    """

    def __init__(self, cache: PagedCache, model: Decoder, tier: SecondTier) -> None:
        self.cache, self.config, self.machine = cache, model.config, tier.machine
        if not cache.swap_pool.num_frames and tier.path is None:
            raise ValueError("a second tier needs room: give the engine num_swap_pages, or the tier a path")
        self._dtype = DTYPES.get(cache.k.dtype, str(cache.k.dtype))
        if tier.machine is not None:
            _check_figures(tier, self._dtype, cache.k.is_cuda)
        self.pool: KeepingPool = cache.swap_pool
        self.pool.reclaim = self._reclaim
        self._in_memory: OrderedDict[PageName, int] = OrderedDict()  # name → frame, the one used longest ago first
        self.file: PageFile | None = None
        if tier.path is not None:
            layers, _, *page = cache.k.shape
            shape = (2, layers, *page)
            self.file = PageFile(Path(tier.path), tier.num_pages, fingerprint(model), shape, cache.k.dtype)

    def __contains__(self, name: PageName) -> bool:
        """Whether a page seems to be in one of the tiers."""
        return name in self._in_memory or (self.file is not None and name in self.file)

    def put(self, name: PageName, page: int) -> None:
        """Take in a page of the engine's pool; one that came from here is here still."""
        if name in self._in_memory:
            self._in_memory.move_to_end(name)
            return
        try:
            frame = self.pool.allocate()
        except OutOfFrames:
            self._to_file(name, _content(self.cache.k, self.cache.v, page))
            return
        self.cache.swap_k[:, frame], self.cache.swap_v[:, frame] = self.cache.k[:, page], self.cache.v[:, page]
        self.pool.keep(frame)
        self.pool.release(frame)
        self._in_memory[name] = frame

    def get(self, name: PageName) -> Tensor | None:
        """A copy of a page, (2, num_layers, num_kv_heads, page_size, head_dim); None if it is not there, or damaged."""
        if name not in self._in_memory:
            return None if self.file is None else self.file.get(name)
        self._in_memory.move_to_end(name)
        return _content(self.cache.swap_k, self.cache.swap_v, self._in_memory[name])

    def worth(self, start: int, names: list[PageName]) -> int:
        """How many of these pages should come back, behind `start` tokens that are there, and the rest be computed.

        Computing is priced by its arithmetic alone, since the weights are read for the tokens behind them in any case,
        and the logits of those alone are needed; coming back, by the bytes that each page moves from where it is. The
        first pages of a chain may be in memory and its end in a file: where they part, it may pay to stop.
        """
        if self.machine is None:
            return len(names)
        saved, size = [0.0], self.cache.page_size
        for page, name in enumerate(names):
            flops = product_flops(self.config, size, rows=0)
            flops += pair_flops(self.config, pairs_behind(start + page * size, size))
            computed = price(Cost(flops, dtype=self._dtype), self.machine).seconds
            saved.append(saved[-1] + computed - self._seconds(name))
        return saved.index(max(saved))

    def clear(self) -> None:
        """Forget every page, and give the file up, which goes on naming the model that was served until now."""
        for frame in self._in_memory.values():
            self.pool.drop(frame)
        self._in_memory.clear()
        if self.file is not None:
            self.file.close()
            self.file = None

    def check_invariants(self) -> None:
        """What is kept in the swap pool is what is known here."""
        assert sorted(self._in_memory.values()) == sorted(self.pool.kept), "tier and swap pool keep different pages"
        if self.file is not None:
            self.file.check_invariants()

    def _seconds(self, name: PageName) -> float:
        """Seconds until a page is back."""
        nbytes, machine = self.cache.page_bytes, self.machine
        way = Cost(message_bytes=nbytes) if self.cache.k.is_cuda else Cost(bytes=2 * nbytes)
        seconds = price(way, machine, "pcie" if self.cache.k.is_cuda else None).seconds
        return seconds if name in self._in_memory else seconds + nbytes / machine.bandwidths["disk_read"]

    def _reclaim(self) -> None:
        """Free a frame of host memory; its page goes to the file."""
        name, frame = next(iter(self._in_memory.items()))
        self._to_file(name, _content(self.cache.swap_k, self.cache.swap_v, frame))
        del self._in_memory[name]
        self.pool.drop(frame)

    def _to_file(self, name: PageName, content: Tensor) -> None:
        if self.file is not None:
            self.file.put(name, content.cpu())


def _check_figures(tier: SecondTier, dtype: str, on_gpu: bool) -> None:
    """The machine can price all that a tier does."""
    tier.machine.peak(dtype)
    if on_gpu:
        tier.machine.link("pcie")
    if tier.path is not None and "disk_read" not in tier.machine.bandwidths:
        raise NotOnThisMachine(f"{tier.machine.title} has no figure disk_read; measure it, or leave the machine out")


def fingerprint(model: Decoder) -> str:
    """SHA-256 over a model's shape and all its weights, in the form in which it computes: packed is another form."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, module in model.named_modules():
        for tensor in _tensors_of(module):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().to_dense() if tensor.is_mkldnn else tensor.detach()
            digest.update(plain.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for value in vars(module).values():
        value = getattr(value, "panels", value)
        if isinstance(value, Tensor):
            yield value


def _content(k: Tensor, v: Tensor, page: int) -> Tensor:
    """A copy of a page."""
    return torch.stack((k[:, page], v[:, page]))
