"""A durable key-value store: a log that is written ahead, snapshots that cut it short, and one rule.

    put, delete ─→ group in memory ─ commit ─→ append to the log, fsync ─→ acknowledged, seen by `get`
    snapshot    ─→ new segment ─→ parts ─→ manifest, published last ─→ older snapshots and segments removed

The rule: nothing is acknowledged, and nothing that is needed is removed, before the disk has confirmed what takes its
place. After an fsync that failed, nobody knows what is durable; the store then refuses to go on, and whoever opens it
again finds out from the disk.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable, Iterator

from minilib.classic.write_ahead_log.restart import (
    LOG,
    MANIFEST,
    SNAPSHOT,
    Recoverer,
    apply_record,
    delete_record,
    leftovers,
    put_record,
    snapshot_of,
)
from minilib.mechanisms.journaling import (
    SEGMENT_BYTES,
    CutFile,
    Disk,
    DiskStep,
    Manifest,
    ManifestEntry,
    RemoveFile,
    SyncFailed,
    append,
    commit,
    expendable_segments,
    frame,
    numbered,
    numbers_of,
    publish,
    retained,
    retire,
    segment_header,
)

NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class NoSpaceLeft(OSError):
    """The disk is full: what was asked for is not done, what was acknowledged is there, and the store goes on."""


class StoreFailed(RuntimeError):
    """The store does not know what is durable, and refuses to go on; open it again to find out."""


class DurableStore:
    """Keys and values, bytes both, that outlast the process and the power. One thread at a time may use it.

    Args:
        disk: nobody else uses it.
        keep: snapshots to keep, 1 or more; an older one serves if the newest is damaged.
        recoverer: reads the store back from a disk.
        salt: gives 32 bits by chance, for each segment.

    Attributes:
        recovered: what was found when it was opened. Its `values` are this store's own.

    Raises:
        JournalDamaged, SegmentMissing, UnknownFormat: as `Recoverer.recover`.
        NoSpaceLeft, OSError: if the disk refuses.
        ValueError: if keep is below 1.
    """

    def __init__(
        self,
        disk: Disk,
        keep: int = 1,
        recoverer: Callable[[Disk], Recoverer] = Recoverer,
        salt: Callable[[], int] = lambda: random.SystemRandom().getrandbits(32),
    ) -> None:
        retained([], keep)
        self._disk, self._keep, self._recoverer, self._new_salt = disk, keep, recoverer, salt
        self._group: list[bytes] = []
        self._failure: str | None = None
        self.recovered = found = recoverer(disk).recover()
        self._values, self._next, self._snapshot = found.values, found.next_sequence, found.snapshot
        self._segment, self._salt, self._end = found.segment, found.salt, found.end
        self._run(leftovers(disk.names()), "cleaning up")
        self._remove_old()
        if self._segment is None:
            self._begin_segment()

    @property
    def num_acknowledged(self) -> int:
        """Records that are durable, since the store was made."""
        return self._next

    @property
    def log_bytes(self) -> int:
        """Bytes of the segment that is written now."""
        return self._end

    def __len__(self) -> int:
        """Keys."""
        return len(self._values)

    def get(self, key: bytes) -> bytes | None:
        """The durable value of a key; None if it has none. What is not committed is not seen."""
        return self._values.get(key)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys with their durable values."""
        yield from self._values.items()

    def put(self, key: bytes, value: bytes) -> int:
        """Give a key a value with the next `commit`.

        Returns:
            Sequence of the record: it is durable once `num_acknowledged` is larger.

        Raises:
            TypeError: if one is not bytes.
        """
        return self._add(put_record(_checked("a key", key), _checked("a value", value)))

    def delete(self, key: bytes) -> int:
        """Remove a key with the next `commit`; one that is not there may be removed, too. Returns as `put`."""
        return self._add(delete_record(_checked("a key", key)))

    def commit(self) -> int:
        """Make the group of records since the last commit durable.

        Returns:
            `num_acknowledged`, which is what may be told to others.

        Raises:
            NoSpaceLeft: if the disk is full; the group is dropped, and the store is as before.
            StoreFailed: if the disk fails, or the store has failed before. The group may be durable, or may be not.

        Cost: one fsync, however many records; none without records.
        """
        group, self._group = self._group, []
        if not group:
            self._check_alive()
            return self._next
        stored = b"".join(frame(body, self._next + place, self._next, self._salt) for place, body in enumerate(group))
        self._run(append(self._log, stored, self._end), f"committing {len(group)} records", self._cut_back)
        for body in group:
            apply_record(self._values, body)
        self._next += len(group)
        self._end += len(stored)
        return self._next

    def snapshot(self) -> int:
        """Commit, write all values as a snapshot, and remove the snapshots and segments that nobody needs any more.

        Returns:
            Records that the newest snapshot covers.

        Raises:
            NoSpaceLeft, StoreFailed: as `commit`; the older snapshot and the log serve on.

        Cost: 6 fsyncs, 1 more with records to commit and 1 more for each snapshot removed; the bytes of all values.
        """
        self.commit()
        if self._next == self._snapshot:
            return self._snapshot
        if self._segment != self._next:
            self._begin_segment()
        name, data = numbered(SNAPSHOT, self._next), snapshot_of(self._values)
        manifest = Manifest(self._next, {name: ManifestEntry.of(data)})
        steps = commit(numbered(MANIFEST, self._next), manifest.packed(), {name: data})
        self._run(steps, "writing a snapshot", self._clean_up)
        self._snapshot = self._next
        self._remove_old()
        return self._snapshot

    def check_invariants(self) -> None:
        """The disk gives back what the store says, and the last segment ends where the next record goes.

        Raises:
            AssertionError: if not.
        """
        assert self._failure is None, self._failure
        found = self._recoverer(self._disk).look()
        assert found.values == self._values, "the disk holds other values than the store"
        assert (found.next_sequence, found.segment, found.end) == (self._next, self._segment, self._end), found
        assert found.torn_bytes == 0 and found.snapshot == self._snapshot and not found.skipped, found
        assert len(numbers_of(MANIFEST, self._disk.names())) <= self._keep, "older snapshots were not removed"

    @property
    def _log(self) -> str:
        return numbered(LOG, self._segment)

    def _add(self, body: bytes) -> int:
        self._check_alive()
        frame(body, 0, 0, 0)  # a record that is too long is refused now, and not with its whole group
        self._group.append(body)
        return self._next + len(self._group) - 1

    def _begin_segment(self) -> None:
        salt = self._new_salt()
        steps = publish(numbered(LOG, self._next), segment_header(self._next, salt))
        self._run(steps, "beginning a segment", self._clean_up)
        self._segment, self._salt, self._end = self._next, salt, SEGMENT_BYTES

    def _remove_old(self) -> None:
        """Remove what is not kept, and snapshots that recovery could not use, since the log has made up for them."""
        names = self._disk.names()
        snapshots = numbers_of(MANIFEST, names)
        kept = retained([number for number in snapshots if number <= self._snapshot], self._keep)
        for number in snapshots:
            if number not in kept:
                steps = retire(numbered(MANIFEST, number), [numbered(SNAPSHOT, number)])
                self._run(steps, "removing a snapshot")
        if len(kept) == self._keep:  # with fewer, the oldest way to recover begins with an empty store
            old = expendable_segments(kept[0], numbers_of(LOG, names))
            self._run([RemoveFile(numbered(LOG, first)) for first in old], "removing segments")

    def _clean_up(self) -> None:
        self._disk.run(leftovers(self._disk.names()))

    def _cut_back(self) -> None:
        self._disk.run([CutFile(self._log, self._end)])  # the next fsync makes it durable; until then it is a torn tail

    def _check_alive(self) -> None:
        if self._failure:
            raise StoreFailed(f"{self._failure}; what is durable is not known: close this store and open it again")

    def _run(self, steps: Iterable[DiskStep], what: str, undo: Callable[[], None] | None = None) -> None:
        """Have the disk take steps; after a failure that is not undone the store takes no more."""
        self._check_alive()
        self._failure = f"{what} was interrupted"
        try:
            full = self._try(steps, undo)
        except OSError as error:
            self._failure = f"{what} failed: {error}"
            raise StoreFailed(f"{self._failure}; close this store and open it again") from error
        self._failure = None
        if full:
            raise NoSpaceLeft(full.errno, f"{what} found no space on the disk; make room, and do it again") from full

    def _try(self, steps: Iterable[DiskStep], undo: Callable[[], None] | None) -> OSError | None:
        """Have the disk take steps; returns why there was no space for them, once they are undone."""
        try:
            self._disk.run(steps)
        except SyncFailed:
            raise
        except OSError as error:
            if undo is None or error.errno not in NO_SPACE:
                raise
            undo()
            return error
        return None


def _checked(what: str, value: bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{what} is bytes, got {type(value).__name__}")
    return value
