"""A pool that keeps frames when their last holder has gone: what is in them may be wanted again.

    held by tables        not to be touched
    kept, held by none    idle: counts as free, and is given up when a frame is needed and none is empty
    empty                 taken first

An operating system keeps files in the memory that nobody needs just now in the same way, and calls it free, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from minilib.mechanisms.caching import NothingToEvict
from minilib.mechanisms.paging import FramePool, PageTable


def nothing_kept() -> int:
    """What a pool reclaims before somebody keeps frames in it."""
    raise NothingToEvict("no frame of this pool is kept")


class KeepingPool(FramePool):
    """A pool of frames, some of which are kept for their content. Keeping a frame counts as one holder of it.

    Args:
        num_frames: frames in the pool.

    Attributes:
        kept: frames that are kept, whether tables hold them or not.
        num_idle: kept frames that no table holds.
        reclaim: stops keeping an idle frame, by `drop`; whoever keeps frames sets it.
    """

    def __init__(self, num_frames: int) -> None:
        super().__init__(num_frames)
        self.kept: set[int] = set()
        self.num_idle = 0
        self.reclaim: Callable[[], object] = nothing_kept

    @property
    def num_free(self) -> int:
        """Frames that no table holds: empty or idle."""
        return len(self._free) + self.num_idle

    def allocate(self) -> int:
        """As `FramePool.allocate`; an idle frame is given up if none is empty."""
        if not self._free and self.num_idle:
            self.reclaim()
        return super().allocate()

    def keep(self, frame: int) -> None:
        """Hold a frame for its content; a table holds it now."""
        assert frame not in self.kept, f"frame {frame} is kept already"
        self.share(frame)
        self.kept.add(frame)

    def drop(self, frame: int) -> None:
        """Stop keeping an idle frame: it is empty now."""
        assert self.is_idle(frame), f"frame {frame} is in use and cannot be given up"
        self.kept.remove(frame)
        self.num_idle -= 1
        self.release(frame)

    def in_use(self, frame: int) -> bool:
        """Whether a table holds a kept frame."""
        return self.ref_counts[frame] > 1

    def is_idle(self, frame: int) -> bool:
        """Whether a frame is kept and no table holds it."""
        return frame in self.kept and not self.in_use(frame)

    def share(self, frame: int) -> int:
        """As `FramePool.share`; an idle frame is in use again."""
        self.num_idle -= self.is_idle(frame)
        return super().share(frame)

    def release(self, frame: int) -> None:
        """As `FramePool.release`; a kept frame that its last table gives back is idle."""
        super().release(frame)
        self.num_idle += self.is_idle(frame)

    def check_invariants(self, tables: Iterable[PageTable] | None = None) -> None:
        """As `FramePool.check_invariants`; what is kept counts as held once, and idle frames are counted right."""
        keeper = PageTable(self, 1)
        keeper.frames = list(self.kept)
        super().check_invariants(None if tables is None else [*tables, keeper])
        assert self.num_idle == sum(not self.in_use(frame) for frame in self.kept), "idle frames are miscounted"
        assert all(self.ref_counts[frame] for frame in self.kept), "an empty frame is kept"
