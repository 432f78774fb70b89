"""Swapping: more pages than frames. Which page has to leave memory when another one is wanted, and what that moves.

Sources: Belady, Nelson and Shedler, "An anomaly in space-time characteristics of certain programs running in a paging
machine", CACM 1969; Corbató, "A paging experiment with the Multics system", 1968 (the clock).
"""

from __future__ import annotations

from minilib.mechanisms.paging import Copy, OutOfPages, PagePool


class Fifo:
    """Evict what came first. Simple, but more memory can mean more faults (Belady 1969)."""

    def __init__(self) -> None:
        self._used: dict[int, bool] = {}  # in the order of eviction; the value is Clock's bit

    def __len__(self) -> int:
        return len(self._used)

    def add(self, page: int) -> None:
        """A page was brought in."""
        self._used[page] = False

    def use(self, page: int) -> None:
        """A page that is here was read or written."""

    def evict(self) -> int:
        """Choose a page to give up, and forget it.

        Raises:
            LookupError: if there is none.
        """
        if not self._used:
            raise LookupError("there is no page to evict")
        page = next(iter(self._used))
        del self._used[page]
        return page


class Lru(Fifo):
    """Evict what was used longest ago. Needs to hear of every use, which hardware will not tell."""

    def use(self, page: int) -> None:
        del self._used[page]
        self.add(page)


class Clock(Fifo):
    """Evict the first page not used since the hand last passed. Needs one bit a page, which the MMU sets by itself."""

    def use(self, page: int) -> None:
        self._used[page] = True

    def evict(self) -> int:
        while any(self._used.values()):
            page = next(iter(self._used))
            if not self._used.pop(page):
                return page
            self.add(page)  # used: the hand clears its bit and passes on
        return super().evict()


class Pager:
    """One address space over a fast and a slow pool. A page that is used is brought into the fast one, and if that is
    full another is moved out first.

    Args:
        fast: frames that can be used.
        slow: frames that hold what does not fit.
        order: who has to go: `Fifo`, `Lru` or `Clock`.
    """

    def __init__(self, fast: PagePool, slow: PagePool, order: Fifo) -> None:
        self.fast, self.slow, self.order = fast, slow, order
        self.resident: dict[int, int] = {}  # page → fast frame
        self.swapped: dict[int, int] = {}  # page → slow frame
        self.faults = 0

    def use(self, page: int) -> tuple[Copy | None, Copy | None]:
        """Read or write a page.

        Returns:
            The copies to make, in this order: a victim from the fast to the slow pool, then this page from the slow to
            the fast one. Each is None where nothing has to move.

        Raises:
            OutOfPages: if both pools are full; nothing was changed.
        """
        if page in self.resident:
            self.order.use(page)
            return None, None
        room = self.fast.num_free > 0
        if not room and not (len(self.order) and self.slow.num_free):
            raise OutOfPages(f"page {page} needs a frame, and neither the fast nor the slow pool has one free")
        self.faults += 1
        source = self.swapped.pop(page, None)
        moved_out = None if room else self._move_out()
        frame = self.resident[page] = self.fast.allocate()
        self.order.add(page)
        if source is None:
            return moved_out, None
        self.slow.release(source)
        return moved_out, Copy(source, frame)

    def check_invariants(self) -> None:
        """Each page is in one place, and both pools count exactly those."""
        assert not self.resident.keys() & self.swapped.keys(), "a page is in both pools"
        assert len(self.order) == len(self.resident), "a page that is not here could be evicted"
        assert len(self.resident) == self.fast.num_pages - self.fast.num_free
        assert len(self.swapped) == self.slow.num_pages - self.slow.num_free
        self.fast.check_invariants()
        self.slow.check_invariants()

    def _move_out(self) -> Copy:
        victim = self.order.evict()
        frame = self.resident.pop(victim)
        self.swapped[victim] = self.slow.allocate()
        self.fast.release(frame)
        return Copy(frame, self.swapped[victim])
