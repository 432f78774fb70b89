"""A file as pages in memory and pages on a disk, and what a power cut may leave of it.

a page that was written since the last fsync    any version since then, each page for itself
the size                                        any size since then, for itself; a missing page is zeros
a cut                                           happens or not; what was written behind it is there only with it
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class _Epoch:
    """The time between two cuts: versions of pages and sizes that may be on the disk, the oldest first."""

    pages: dict[int, list[bytes]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [0])


class CachedFile:
    """A file, empty and durable in the beginning.

    Args:
        page_size: bytes that the disk writes whole or not at all.

    Attributes:
        size: bytes, as a process finds it while there is power.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._epochs = [_Epoch()]
        self._dirty: set[int] = set()  # pages that an fsync would write
        self._resized = False

    @property
    def size(self) -> int:
        return self._epochs[-1].sizes[-1]

    def write(self, data: bytes, offset: int) -> None:
        """Write bytes; the file grows if it must, and not for none."""
        if not data:
            return
        end, pages = offset + len(data), self._epochs[-1].pages
        for page in range(offset // self._page_size, math.ceil(end / self._page_size)):
            start = page * self._page_size
            versions = pages.setdefault(page, [bytes(self._page_size)])
            content = bytearray(versions[-1])
            low, high = max(offset, start), min(end, start + self._page_size)
            content[low - start : high - start] = data[low - offset : high - offset]
            versions.append(bytes(content))
            self._dirty.add(page)
        self._resize(max(end, self.size))
        self._resized |= end > self._epochs[-1].sizes[0]  # what an fsync has written can be read, so the size holds it

    def cut(self, size: int) -> None:
        """Cut the file off, or make it longer, with zeros."""
        if size >= self.size:
            self._resize(size)
            return
        last, inside = size // self._page_size, size % self._page_size
        before = self._epochs[-1].pages
        pages = {page: list(versions) for page, versions in before.items() if page < last}
        if inside and last in before:
            pages[last] = [version[:inside] + bytes(self._page_size - inside) for version in before[last]]
        self._epochs.append(_Epoch(pages, [size]))
        self._dirty &= pages.keys()
        self._resized = True

    def sync(self) -> int:
        """Make durable what is dirty; returns how many pages that were."""
        del self._epochs[:-1]
        flushed = len(self._dirty)
        for page in self._dirty:
            del self._epochs[0].pages[page][:-1]
        if self._resized:
            del self._epochs[0].sizes[:-1]
        self.fail_to_sync()
        return flushed

    def fail_to_sync(self) -> None:
        """Take what is dirty for clean, though it is in memory alone."""
        self._dirty.clear()
        self._resized = False

    def content(self) -> bytes:
        """All bytes, as a process finds them while there is power."""
        return self._content(self._epochs[-1], lambda versions: versions[-1])

    def num_states(self) -> int:
        """How many a power cut chooses from, equal ones counted more than once."""
        return sum(math.prod(map(len, self._options(epoch))) for epoch in self._epochs)

    def states(self) -> Iterator[bytes]:
        """What a power cut may leave."""
        for epoch in self._epochs:
            for chosen in itertools.product(*self._options(epoch)):
                remaining = iter(chosen)
                yield self._content(epoch, lambda versions, remaining=remaining: next(remaining))

    def state(self, choose: Callable[[Sequence], object]) -> bytes:
        """One of them, by a function that takes one of several options."""
        return self._content(choose(self._epochs), lambda versions: choose(_distinct(versions)))

    def _resize(self, size: int) -> None:
        if size != self.size:
            self._epochs[-1].sizes.append(size)
            self._resized = True

    def _options(self, epoch: _Epoch) -> list[list]:
        return [_distinct(epoch.sizes), *(_distinct(versions) for _, versions in sorted(epoch.pages.items()))]

    def _content(self, epoch: _Epoch, choose: Callable[[list], object]) -> bytes:
        size = choose(epoch.sizes)
        content = bytearray(max(size, (max(epoch.pages, default=-1) + 1) * self._page_size))
        for page, versions in sorted(epoch.pages.items()):
            content[page * self._page_size : (page + 1) * self._page_size] = choose(versions)
        return bytes(content[:size])


def _distinct(versions: list) -> list:
    return list(dict.fromkeys(versions))
