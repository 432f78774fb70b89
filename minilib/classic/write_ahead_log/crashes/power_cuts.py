"""Every way in which a run of the store may be broken off, and what recovery makes of it.

A run is recorded once, as the steps that the disk took and what was acknowledged when. Then the power is cut after
every step, and each state that the disk may be in is recovered and held against the run:

    whole      the store holds what it held after n records, and n is no less than what was acknowledged
    lost       as it was after fewer records: somebody was told that more are durable
    torn       as it never was
    refused    recovery ends in an error by name, and what was acknowledged is not served
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk, Files
from minilib.classic.write_ahead_log.restart import Recoverer
from minilib.classic.write_ahead_log.store import DurableStore, NoSpaceLeft, StoreFailed
from minilib.mechanisms.journaling import Disk, DiskStep, JournalDamaged, SegmentMissing, UnknownFormat

WHOLE, LOST, TORN, REFUSED = OUTCOMES = ("whole", "lost", "torn", "refused")
REFUSALS = (JournalDamaged, SegmentMissing, UnknownFormat)
GARBLED = (struct.error, ValueError, LookupError, FileNotFoundError)  # what a reader may meet that checks nothing
COMMIT, SNAP = "commit", "snapshot"
History = Mapping[int, Mapping[bytes, bytes]]  # number of records → the values after them
Change = tuple[bytes, bytes | None] | str  # a key and its value, None to delete it; or COMMIT, or SNAP


@dataclass(frozen=True)
class RecordedRun:
    """What a store did.

    Args:
        disk: makes the disk that it began with.
        steps: that the disk was asked to take, in order; one that failed is among them.
        acknowledged: (steps, records): after so many steps so many records were acknowledged, in order.
        history: number of records → values of the store after them.
    """

    disk: Callable[[], FaultyDisk]
    steps: tuple[DiskStep, ...]
    acknowledged: tuple[tuple[int, int], ...]
    history: History

    def acknowledged_after(self, num_steps: int) -> int:
        """Records that were acknowledged once so many steps had been taken."""
        return max((records for steps, records in self.acknowledged if steps <= num_steps), default=0)

    def disk_after(self, num_steps: int) -> FaultyDisk:
        """The disk after so many steps, as it is while there is power: what a killed process leaves."""
        disk = self.disk()
        for step in self.steps[:num_steps]:
            take_or_fail(disk, step)
        return disk


@dataclass(frozen=True)
class CrashTally:
    """How many states are how.

    Args:
        points: at which the power was cut.
        outcomes: outcome → states.
        exhaustive: whether all states that the disk may be in were tried.
    """

    points: int
    outcomes: Mapping[str, int]
    exhaustive: bool

    @property
    def states(self) -> int:
        """All of them."""
        return sum(self.outcomes.values())

    @property
    def broken(self) -> int:
        """Those that are not whole."""
        return self.states - self.outcomes[WHOLE]


class WatchedDisk:
    """A disk in front of another one, which keeps the steps that come by.

    Args:
        disk: takes them.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.steps: list[DiskStep] = []

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps, in order; see `Disk.run`."""
        for step in steps:
            self.steps.append(step)
            self._disk.run([step])

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder."""
        return self._disk.names(folder)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return self._disk.read(name)


def take_or_fail(disk: FaultyDisk, step: DiskStep) -> None:
    """Take a step that may fail."""
    try:
        disk.run([step])
    except OSError:
        return


def record_run(
    changes: Sequence[Change],
    disk: Callable[[], FaultyDisk] = FaultyDisk,
    altered: Callable[[Disk], Disk] = lambda disk: disk,
    recoverer: Callable[[Disk], Recoverer] = Recoverer,
    keep: int = 1,
) -> RecordedRun:
    """Let a store do things, and note what the disk does and what is acknowledged when.

    Args:
        changes: what the store does, in order; after an error of the disk the rest is left undone.
        disk: makes the disk, an equal one each time.
        altered: puts something between the store and its disk, such as a rule left out.
        recoverer: of the store.
        keep: snapshots of the store.
    """
    watched = WatchedDisk(disk())
    salts = iter(range(0x5A175A17, 0x5A185A17))
    store = DurableStore(altered(watched), keep, recoverer, lambda: next(salts))
    acknowledged = [(len(watched.steps), store.num_acknowledged)]
    history = {store.num_acknowledged: dict(store.items())}
    try:
        for change in changes:
            _make(store, change, history)
            acknowledged.append((len(watched.steps), store.num_acknowledged))
    except (StoreFailed, NoSpaceLeft):
        pass  # as far as it came
    return RecordedRun(disk, tuple(watched.steps), tuple(acknowledged), history)


def crash_everywhere(
    run: RecordedRun, outcome: Callable[[Files, int, History], str] | None = None, limit: int = 4096, seed: int = 0
) -> CrashTally:
    """Cut the power after each number of steps, and recover each state that the disk may be in.

    Args:
        run: what was done.
        outcome: files, records acknowledged and the run's history → one of OUTCOMES; `outcome_of` if not given.
        limit: states a point; more are chosen by chance, with this seed.
        seed: see there.
    """
    outcome = outcome or outcome_of
    disk, outcomes, exhaustive = run.disk(), Counter(dict.fromkeys(OUTCOMES, 0)), True
    for num_steps in range(len(run.steps) + 1):
        left = disk.power_cut(limit, seed + num_steps)
        exhaustive &= left.exhaustive
        acknowledged = run.acknowledged_after(num_steps)
        outcomes.update(outcome(files, acknowledged, run.history) for files in left.states)
        if num_steps < len(run.steps):
            take_or_fail(disk, run.steps[num_steps])
    return CrashTally(len(run.steps) + 1, outcomes, exhaustive)


def outcome_of(
    files: Files,
    acknowledged: int,
    history: History,
    recoverer: Callable[[Disk], Recoverer] = Recoverer,
) -> str:
    """What recovery makes of the files that a power cut has left: one of OUTCOMES."""
    try:
        store = DurableStore(FaultyDisk(files), recoverer=recoverer)
    except REFUSALS:
        return REFUSED
    except GARBLED:
        return TORN
    return held_against(store.num_acknowledged, dict(store.items()), acknowledged, history)


def held_against(num_records: int, values: Mapping[bytes, bytes], acknowledged: int, history: History) -> str:
    """WHOLE, LOST or TORN: values after so many records, if so many were acknowledged."""
    if num_records < acknowledged and (num_records not in history or values == history[num_records]):
        return LOST
    return WHOLE if values == history.get(num_records) else TORN


def with_change(values: Mapping[bytes, bytes], key: bytes, value: bytes | None) -> dict[bytes, bytes]:
    """Values after a key got another value, or none."""
    others = {other: held for other, held in values.items() if other != key}
    return others if value is None else {**others, key: value}


def _make(store: DurableStore, change: Change, history: dict[int, dict[bytes, bytes]]) -> None:
    if change == COMMIT:
        store.commit()
        return
    if change == SNAP:
        store.snapshot()
        return
    key, value = change
    sequence = store.delete(key) if value is None else store.put(key, value)
    history[sequence + 1] = with_change(history[sequence], key, value)
