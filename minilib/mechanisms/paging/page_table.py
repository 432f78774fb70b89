"""Paging: memory in frames of one size, tables that say which frame holds which page, and what follows from that.

    frames of A   [ 5 │ 2 │ 7 ]        pool    0   1   2   3   4   5   6   7
    frames of B   [ 5 │ 2 │ 4 ]                ·   ·  A B  ·   B  A B  ·   A      (· free)

A page is virtual, a part of one process or one sequence; a frame is physical, a place that holds a page. A page gets
its frame at the first write (demand paging), shares it with the pages of forks until one of them is written
(copy-on-write), and leaves it for a frame of a slower pool when the fast pool is full (swapping). The classes here hold
no data and move none: they decide, and return the copies that the owner of the memory must make before it writes. So
the same classes page the address space of a process and the keys and values of a language model.

Sources: Denning, "Virtual Memory", Computing Surveys 1970; Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.basics.checks import check_whole


class OutOfFrames(MemoryError):
    """The pool has too few free frames; nothing was changed."""


@dataclass(frozen=True)
class Copy:
    """The content of frame `source` must be copied to frame `target` before either is written.

    Args:
        source: number of the frame to read.
        target: number of the frame to write; after a move it belongs to another pool than the source.
    """

    source: int
    target: int


@dataclass(frozen=True)
class Fault:
    """What a write to a page made necessary.

    Args:
        frame: the frame that holds the page now and may be written.
        copy: the copy that must come first, if the page shared its frame; None for a first touch.
    """

    frame: int
    copy: Copy | None = None


class FramePool:
    """Frames numbered from 0, those that are free, and the number of tables that hold each of the others.

    Args:
        num_frames: frames in the pool; a pool of 0 frames is always full.

    Raises:
        ValueError: if num_frames is no whole number ≥ 0.
    """

    def __init__(self, num_frames: int) -> None:
        check_whole("num_frames", num_frames)
        self.num_frames = num_frames
        self.ref_counts = [0] * num_frames
        self._free = list(range(num_frames - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Frames that no table holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Frames that at least one table holds."""
        return self.num_frames - self.num_free

    def allocate(self) -> int:
        """Take a free frame: the one freed last, whose content is likeliest to be in a cache.

        Returns:
            The frame's number; its count of holders is 1.

        Raises:
            OutOfFrames: if no frame is free.
        """
        if not self._free:
            raise OutOfFrames(f"all {self.num_frames} frames of the pool are taken")
        frame = self._free.pop()
        self.ref_counts[frame] = 1
        return frame

    def share(self, frame: int) -> int:
        """Count one more holder of a frame that is held; returns the frame."""
        assert self.ref_counts[frame] > 0, f"frame {frame} is free and cannot be shared"
        self.ref_counts[frame] += 1
        return frame

    def release(self, frame: int) -> None:
        """Count one holder less; the last holder frees the frame."""
        assert self.ref_counts[frame] > 0, f"frame {frame} was freed twice"
        self.ref_counts[frame] -= 1
        if not self.ref_counts[frame]:
            self._free.append(frame)

    def check_invariants(self, tables: Iterable[PageTable] | None = None) -> None:
        """Every frame is either free or held, once each; given all tables, held by exactly as many as counted."""
        assert len(set(self._free)) == len(self._free), "a frame is free twice"
        assert sum(count == 0 for count in self.ref_counts) == len(self._free), "a frame is neither free nor held"
        assert all(self.ref_counts[frame] == 0 for frame in self._free), "a held frame is free"
        if tables is not None:
            held = Counter(frame for table in tables if table.pool is self for frame in table.present())
            for frame, count in enumerate(self.ref_counts):
                assert count == held[frame], f"frame {frame} counts {count} holders and has {held[frame]}"


class PageTable:
    """The frame of every page, for one process or one sequence.

    Pages are touched in any order (a process) or appended (a sequence); both lead through `touch`.

    Args:
        pool: the pool that frames are taken from.
        page_size: slots in a page: bytes of a process, tokens of a sequence.

    Attributes:
        frames: the frame of each page; None for a page that has none, for instance before its first touch.
        length: slots in use, counted from slot 0: what `append` has added.

    Raises:
        ValueError: if page_size is no whole number ≥ 1.
    """

    def __init__(self, pool: FramePool, page_size: int) -> None:
        check_whole("page_size", page_size, 1)
        self.pool = pool
        self.page_size = page_size
        self.frames: list[int | None] = []
        self.length = 0

    def present(self) -> list[int]:
        """The frames of this table's pages, in the order of the pages; pages without a frame are left out."""
        return [frame for frame in self.frames if frame is not None]

    def reserve(self, num_pages: int) -> None:
        """Add pages that take no frame before they are touched, as mmap does.

        Raises:
            ValueError: if num_pages is below 0.
        """
        if num_pages < 0:
            raise ValueError(f"a table reserves 0 pages or more, got {num_pages!r}")
        self.frames += [None] * num_pages

    def touch(self, page: int) -> Fault | None:
        """Make a page present and private before a write to it.

        Returns:
            What had to be done: nothing (None), a first touch, or a copy of a frame that is shared.

        Raises:
            IndexError: if that page was never reserved.
            OutOfFrames: if a frame is needed and none is free.
        """
        if not 0 <= page < len(self.frames):
            raise IndexError(f"page {page} is outside this table of {len(self.frames)} pages")
        held = self.frames[page]
        if held is not None and self.pool.ref_counts[held] == 1:
            return None
        fresh = self.pool.allocate()
        self.frames[page] = fresh
        if held is None:
            return Fault(fresh)
        self.pool.release(held)
        return Fault(fresh, Copy(held, fresh))

    def frames_needed(self, count: int) -> int:
        """Free frames that `append(count)` takes: one a page not touched yet, and one for a last page that is shared.

        Raises:
            ValueError: if count is below 0.
        """
        written = self._written_by(count)
        held = [frame for frame in self.frames[written.start : written.stop] if frame is not None]
        return len(written) - sum(self.pool.ref_counts[frame] == 1 for frame in held)

    def append(self, count: int) -> list[Copy]:
        """Grow by `count` slots that will be written.

        Returns:
            The copies to make before the first of these slots is written.

        Raises:
            OutOfFrames: if the pool has too few free frames; the table is as it was.
            ValueError: if count is below 0.
        """
        needed, written = self.frames_needed(count), self._written_by(count)
        if needed > self.pool.num_free:
            raise OutOfFrames(f"{count} more slots take {needed} frames, and {self.pool.num_free} are free")
        self.length += count
        self.reserve(max(0, written.stop - len(self.frames)))
        faults = [self.touch(page) for page in written]
        return [fault.copy for fault in faults if fault and fault.copy]

    def translate(self, slot: int) -> tuple[int, int]:
        """Frame and offset of a slot, as the MMU finds them.

        Raises:
            IndexError: if the slot lies outside this table, or on a page without a frame.
        """
        page, offset = divmod(slot, self.page_size)
        if not 0 <= page < len(self.frames) or self.frames[page] is None:
            raise IndexError(
                f"slot {slot} is not mapped: {len(self.present())} of {len(self.frames)} pages have a frame"
            )
        return self.frames[page], offset

    def fork(self) -> PageTable:
        """A second table over the same frames; the first write to a page, by either table, takes a copy."""
        child = PageTable(self.pool, self.page_size)
        child.frames = [frame if frame is None else self.pool.share(frame) for frame in self.frames]
        child.length = self.length
        return child

    def release(self) -> None:
        """Give every frame back."""
        for frame in self.present():
            self.pool.release(frame)
        self.frames, self.length = [], 0

    def move(self, pool: FramePool) -> list[Copy]:
        """Move all pages to another pool (swap out, or back in).

        A frame that other tables hold, too, stays theirs, and this table gets a copy of its own.

        Args:
            pool: the pool to move to.

        Returns:
            The copies to make, from frames of the old pool to frames of the new one.

        Raises:
            OutOfFrames: if the new pool has too few free frames; the table is as it was.
        """
        held = self.present()
        if len(held) > pool.num_free:
            raise OutOfFrames(f"moving takes {len(held)} frames, and the other pool has {pool.num_free} free")
        target: dict[int, int] = {}
        try:
            for frame in held:
                target[frame] = pool.allocate()
        except BaseException:  # a pool that has to give up what it keeps may fail at that
            for frame in target.values():
                pool.release(frame)
            raise
        for frame in held:
            self.pool.release(frame)
        self.frames = [frame if frame is None else target[frame] for frame in self.frames]
        self.pool = pool
        return [Copy(frame, target[frame]) for frame in held]

    def _written_by(self, count: int) -> range:
        """The pages that `append(count)` writes to."""
        if count < 0:
            raise ValueError(f"a table grows by 0 slots or more, got {count!r}")
        first = self.length // self.page_size
        return range(first, ceil_div(self.length + count, self.page_size) if count else first)
