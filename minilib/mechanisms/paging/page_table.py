"""Paging: memory in frames of one size, tables that say which frame holds which page, and what follows from that.

    table of A   [ 5 │ 2 │ 7 ]         pool    0   1   2   3   4   5   6   7
    table of B   [ 5 │ 2 │ 4 ]                 ·   ·  A B  ·   B  A B  ·   A      (· free)

Pages are taken when they are first written (demand paging), shared after a fork until somebody writes (copy-on-write),
and moved to a slower pool when the fast one is full (swapping; swapping.py chooses which). The classes here hold no
data and move none: they decide, and return the copies that whoever owns the memory must make before it writes. So the
same classes page the address space of a process and the keys and values of a language model.

Sources: Denning, "Virtual Memory", Computing Surveys 1970; Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class OutOfPages(MemoryError):
    """The pool has too few free pages; nothing was changed."""


@dataclass(frozen=True)
class Copy:
    """The content of page `source` must be copied to page `target` before either is written."""

    source: int
    target: int


@dataclass(frozen=True)
class Fault:
    """What writing to a page made necessary.

    Args:
        page: the frame that may now be written.
        copy: the copy that must come first, if the frame had been shared; None for a first touch.
    """

    page: int
    copy: Copy | None = None


class PagePool:
    """Frames numbered from 0, those that are free, and how many tables hold each of the others.

    Args:
        num_pages: frames in the pool; 0 makes a pool that is always full.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"a pool has 0 pages or more, got {num_pages!r}")
        self.num_pages = num_pages
        self.ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free page; the one freed last, whose content is likeliest to be in a cache.

        Raises:
            OutOfPages: if there is none.
        """
        if not self._free:
            raise OutOfPages(f"all {self.num_pages} pages of the pool are taken")
        page = self._free.pop()
        self.ref_counts[page] = 1
        return page

    def share(self, page: int) -> int:
        """Count one more holder of a page that somebody holds; returns the page."""
        assert self.ref_counts[page] > 0, f"page {page} is free and cannot be shared"
        self.ref_counts[page] += 1
        return page

    def release(self, page: int) -> None:
        """Count one holder less; the last one frees the page."""
        assert self.ref_counts[page] > 0, f"page {page} was freed twice"
        self.ref_counts[page] -= 1
        if not self.ref_counts[page]:
            self._free.append(page)

    def check_invariants(self, tables: Iterable[PageTable] | None = None) -> None:
        """Every page is either free or held, once each; given all tables, held by exactly as many as counted."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert sum(count == 0 for count in self.ref_counts) == len(self._free), "a page is neither free nor held"
        assert all(self.ref_counts[page] == 0 for page in self._free), "a held page is free"
        if tables is not None:
            held = Counter(page for table in tables if table.pool is self for page in table.present())
            for page, count in enumerate(self.ref_counts):
                assert count == held[page], f"page {page} counts {count} holders and has {held[page]}"


class PageTable:
    """Which frame holds which page, for one process or one sequence.

    Pages are touched in any order (a process) or appended to (a sequence); both lead through `touch`.

    Args:
        pool: where frames come from.
        page_size: slots in a page: bytes of a process, tokens of a sequence.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, got {page_size!r}")
        self.pool = pool
        self.page_size = page_size
        self.pages: list[int | None] = []
        self.num_slots = 0

    def present(self) -> list[int]:
        """The frames that this table holds, in order."""
        return [page for page in self.pages if page is not None]

    def reserve(self, num_pages: int) -> None:
        """Promise pages that cost nothing before they are touched, as mmap does.

        Raises:
            ValueError: if the number is below 0.
        """
        if num_pages < 0:
            raise ValueError(f"a table reserves 0 pages or more, got {num_pages!r}")
        self.pages += [None] * num_pages

    def touch(self, index: int) -> Fault | None:
        """Make page `index` present and private, because it will be written.

        Returns:
            What had to be done: nothing, a first touch, or a copy of a page that is shared.

        Raises:
            IndexError: if that page was never reserved.
            OutOfPages: if a frame is needed and none is free.
        """
        if not 0 <= index < len(self.pages):
            raise IndexError(f"page {index} is outside this table of {len(self.pages)} pages")
        page = self.pages[index]
        if page is not None and self.pool.ref_counts[page] == 1:
            return None
        fresh = self.pool.allocate()
        self.pages[index] = fresh
        if page is None:
            return Fault(fresh)
        self.pool.release(page)
        return Fault(fresh, Copy(page, fresh))

    def pages_needed(self, count: int) -> int:
        """Free pages that `append(count)` takes: those not touched yet, and a copy of the last one if it is shared.

        Raises:
            ValueError: if count is below 0.
        """
        written = self._written_by(count)
        held = [page for page in self.pages[written.start : written.stop] if page is not None]
        return len(written) - sum(self.pool.ref_counts[page] == 1 for page in held)

    def append(self, count: int) -> list[Copy]:
        """Grow by `count` slots that will be written; return the copies to make first.

        Raises:
            OutOfPages: if the pool has too few free pages; the table is as it was.
            ValueError: if count is below 0.
        """
        needed, written = self.pages_needed(count), self._written_by(count)
        if needed > self.pool.num_free:
            raise OutOfPages(f"{count} more slots take {needed} pages, and {self.pool.num_free} are free")
        self.num_slots += count
        self.reserve(max(0, written.stop - len(self.pages)))
        faults = [self.touch(index) for index in written]
        return [fault.copy for fault in faults if fault and fault.copy]

    def translate(self, slot: int) -> tuple[int, int]:
        """Frame and offset of a slot, as the MMU does it.

        Raises:
            IndexError: if the slot lies outside, or its page was never touched.
        """
        index, offset = divmod(slot, self.page_size)
        if not 0 <= index < len(self.pages) or self.pages[index] is None:
            raise IndexError(f"slot {slot} is not mapped: this table has {len(self.present())} pages")
        return self.pages[index], offset

    def fork(self) -> PageTable:
        """A second table over the same frames; whoever writes first gets a copy."""
        child = PageTable(self.pool, self.page_size)
        child.pages = [page if page is None else self.pool.share(page) for page in self.pages]
        child.num_slots = self.num_slots
        return child

    def release(self) -> None:
        """Give every frame back."""
        for page in self.present():
            self.pool.release(page)
        self.pages, self.num_slots = [], 0

    def move(self, pool: PagePool) -> list[Copy]:
        """Move to another pool (swap out, or back in); return the copies from the old pool's frames to the new one's.

        What other tables share stays there for them, and this table gets a copy of its own.

        Raises:
            OutOfPages: if the other pool has too few free pages; the table is as it was.
        """
        held = self.present()
        if len(held) > pool.num_free:
            raise OutOfPages(f"moving takes {len(held)} pages, and the other pool has {pool.num_free} free")
        target = {page: pool.allocate() for page in held}
        for page in held:
            self.pool.release(page)
        self.pages = [page if page is None else target[page] for page in self.pages]
        self.pool = pool
        return [Copy(page, target[page]) for page in held]

    def _written_by(self, count: int) -> range:
        """The pages that `append(count)` writes to."""
        if count < 0:
            raise ValueError(f"a table grows by 0 slots or more, got {count!r}")
        first = self.num_slots // self.page_size
        return range(first, -(-(self.num_slots + count) // self.page_size) if count else first)
