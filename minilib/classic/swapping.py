"""Swapping: more pages than frames. Which page leaves memory when another page needs its frame, and what that moves.

A page moves for all tables that share it: it is in one place at a time, and forks go on sharing it. That is how an
operating system swaps, and why it keeps a reverse map from a frame to the page tables that hold it.

Which page leaves is decided by a policy of mechanisms/caching, whose keys are frames here. A frame that was evicted
holds another page when it comes back, so a policy is told that it was removed, and remembers nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from minilib.mechanisms.caching import EvictionPolicy
from minilib.mechanisms.paging import Copy, FramePool, OutOfFrames, PageTable


class SwapFull(OutOfFrames):
    """Memory and swap are both full; nothing was changed."""


class Pager:
    """Page tables over a fast pool, whose pages move to a slow pool when the fast pool is full.

    Page tables and both pools are kept here; the content is moved by two functions, which are called before anything is
    changed, so that a copy that fails (a full disk) leaves every page where it was.

    If there is a slow pool, one of its frames always stays free: a page moves out first, and then another moves in.

    Args:
        fast: frames that pages are used in.
        slow: frames for pages that do not fit into the fast pool.
        order: how a victim is chosen, such as `Clock()`; it belongs to this pager alone.
        copy_out: copies content from a fast to a slow frame.
        copy_in: copies content from a slow to a fast frame.

    Attributes:
        swapped: for every table, the slow frame of each page that moved out.
        counts: "first touch", "copy", "move out", "move in": how often each was necessary.
    """

    def __init__(
        self,
        fast: FramePool,
        slow: FramePool,
        order: EvictionPolicy,
        copy_out: Callable[[Copy], None] = lambda copy: None,
        copy_in: Callable[[Copy], None] = lambda copy: None,
    ) -> None:
        self.fast, self.slow, self.order = fast, slow, order
        self._copy_out, self._copy_in = copy_out, copy_in
        self.swapped: dict[PageTable, dict[int, int]] = {}
        self.counts: Counter[str] = Counter()
        self._page_in: dict[int, int] = {}  # fast frame → its page, which has the same number in every table

    @property
    def faults(self) -> int:
        """Uses that found their page absent, or shared and about to be written."""
        return self.counts["first touch"] + self.counts["copy"] + self.counts["move in"]

    def new_table(self, page_size: int) -> PageTable:
        """An empty table whose pages may move."""
        table = PageTable(self.fast, page_size)
        self.swapped[table] = {}
        return table

    def fork(self, table: PageTable) -> PageTable:
        """A second table that shares every page, wherever it is, until one of the tables writes to it."""
        child = table.fork()
        self.swapped[child] = {page: self.slow.share(frame) for page, frame in self.swapped[table].items()}
        return child

    def release(self, table: PageTable) -> None:
        """Give every frame of a table back, fast and slow."""
        for frame in self.swapped.pop(table).values():
            self.slow.release(frame)
        held = table.present()
        table.release()
        for frame in held:
            if not self.fast.ref_counts[frame]:
                self._forget(frame)

    def is_private(self, table: PageTable, page: int) -> bool:
        """Whether this page has content, in either pool, that no other table shares.

        Raises:
            IndexError: if that page was never reserved.
        """
        _check_page(table, page)
        if page in self.swapped[table]:
            return self.slow.ref_counts[self.swapped[table][page]] == 1
        frame = table.frames[page]
        return frame is not None and self.fast.ref_counts[frame] == 1

    def read(self, table: PageTable, page: int) -> int | None:
        """Bring a page in if it moved out.

        Returns:
            Its fast frame; None if the page was never touched, and so has no content.

        Raises:
            IndexError: if that page was never reserved.
        """
        _check_page(table, page)
        if page in self.swapped[table]:
            return self._move_in(table, page)
        frame = table.frames[page]
        if frame is not None:
            self.order.use(frame)
        return frame

    def write(self, table: PageTable, page: int) -> int:
        """Make a page present and private before a write to it.

        Returns:
            Its fast frame. If the page was not private before, the frame is a fresh one, and the caller fills it: with
            the content that was shared, or with zeros at the first touch.

        Raises:
            IndexError, SwapFull, OutOfFrames: as `make_room`.
        """
        absent = page in self.swapped[table]
        self.make_room(table, [page])
        fault, frame = table.touch(page), table.frames[page]
        if not fault:
            if not absent:
                self.order.use(frame)
            return frame
        swapped = self.swapped[table].pop(page, None)
        if swapped is not None:
            self.slow.release(swapped)  # other tables share it there
        self.counts["copy" if fault.copy or absent else "first touch"] += 1
        self._page_in[frame] = page
        self.order.add(frame)
        return frame

    def make_room(self, table: PageTable, pages: Iterable[int]) -> None:
        """Prepare a write to several pages at once, so that `write` cannot fail for any of them.

        Brings in those that are private, and frees a frame for each of the others. No content changes, and each page
        is shared by as many tables as before.

        Raises:
            IndexError: if one of the pages was never reserved.
            SwapFull: if both pools together have too few free frames.
            OutOfFrames: the same without a slow pool; or if these are more pages than there are fast frames.
        """
        pages = list(pages)
        private = [page for page in pages if self.is_private(table, page)]
        fresh = len(pages) - len(private)
        self._check_room(len(pages), fresh)
        pinned = {table.frames[page] for page in private} - {None}
        for page in private:
            if page in self.swapped[table]:
                pinned.add(self._move_in(table, page, pinned))
        while self.fast.num_free < fresh:
            self._move_out(pinned)

    def check_invariants(self) -> None:
        """Every page is in one place, shared there by the tables that are counted, and one slow frame is free."""
        self.fast.check_invariants(self.swapped)
        self.slow.check_invariants()
        held = Counter(frame for pages in self.swapped.values() for frame in pages.values())
        assert held == Counter({frame: count for frame, count in enumerate(self.slow.ref_counts) if count})
        assert not self.slow.num_frames or self.fast.num_free + self.slow.num_free, "no page can move"
        assert len(self.order) == len(self._page_in) == self.fast.num_used, "a frame that is free could be evicted"
        for table, pages in self.swapped.items():
            assert all(table.frames[page] is None for page in pages), "a page is in both pools"
            for page, frame in enumerate(table.frames):
                assert frame is None or self._page_in[frame] == page, f"frame {frame} holds another page than {page}"

    def _check_room(self, written: int, fresh: int) -> None:
        if written > self.fast.num_frames:
            raise OutOfFrames(
                f"{written} pages are written at once, and memory has {self.fast.num_frames} frames; write in pieces"
            )
        spare = 1 if self.slow.num_frames else 0
        if fresh <= self.fast.num_free + self.slow.num_free - spare:
            return
        if spare:
            raise SwapFull(
                f"{fresh} frames are needed; {self.fast.num_free} of memory and {self.slow.num_free} of swap are free, "
                "and one must stay free"
            )
        raise OutOfFrames(f"{fresh} frames are needed, {self.fast.num_free} are free, and there is no swap")

    def _move_out(self, pinned: Collection[int]) -> None:
        frame = self.order.victim(lambda frame: frame not in pinned)
        swapped = self.slow.allocate()
        try:
            self._copy_out(Copy(frame, swapped))
        except BaseException:
            self.slow.release(swapped)
            raise
        page = self._page_in[frame]
        holders = [table for table in self.swapped if frame in table.frames[page : page + 1]]
        for table in holders:
            table.frames[page] = None
            self.swapped[table][page] = swapped
            self.fast.release(frame)
        for _ in holders[1:]:
            self.slow.share(swapped)
        self._forget(frame)
        self.counts["move out"] += 1

    def _move_in(self, table: PageTable, page: int, pinned: Collection[int] = ()) -> int:
        if not self.fast.num_free:
            self._move_out(pinned)
        swapped, frame = self.swapped[table][page], self.fast.allocate()
        try:
            self._copy_in(Copy(swapped, frame))
        except BaseException:
            self.fast.release(frame)
            raise
        holders = [table for table, pages in self.swapped.items() if pages.get(page) == swapped]
        for holder in holders:
            del self.swapped[holder][page]
            holder.frames[page] = frame
            self.slow.release(swapped)
        for _ in holders[1:]:
            self.fast.share(frame)
        self._page_in[frame] = page
        self.order.add(frame)
        self.counts["move in"] += 1
        return frame

    def _forget(self, frame: int) -> None:
        del self._page_in[frame]
        self.order.remove(frame)


def _check_page(table: PageTable, page: int) -> None:
    if not 0 <= page < len(table.frames):
        raise IndexError(f"page {page} is outside this table of {len(table.frames)} pages")
