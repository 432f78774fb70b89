"""The rules of a durable store, each left out in turn: how many states that a power cut may leave are broken then.

A rule that orders the disk's steps is left out between the store and its disk, and a rule of reading in the recoverer;
the store itself is the same in all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from minilib.classic.write_ahead_log.crashes.power_cuts import (
    COMMIT,
    SNAP,
    Change,
    CrashTally,
    WatchedDisk,
    crash_everywhere,
    outcome_of,
    record_run,
)
from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk
from minilib.classic.write_ahead_log.restart import LOG, MANIFEST, Recoverer
from minilib.mechanisms.journaling import (
    FRAME_BYTES,
    SEGMENT_BYTES,
    TEMPORARY,
    Disk,
    DiskStep,
    JournalRecord,
    Manifest,
    Scan,
    SyncFailed,
    SyncFile,
    SyncFolder,
    scan,
)

KEPT = "every rule kept"
SMALL_RUN: tuple[Change, ...] = (
    (b"a", b"first " * 9),
    COMMIT,
    (b"b", b"second " * 12),
    (b"a", b"third"),
    COMMIT,
    SNAP,
    (b"c", b"fourth " * 10),
    COMMIT,
    (b"b", None),
    (b"a", b"fifth " * 14),
    SNAP,
    (b"d", b"sixth"),
    COMMIT,
)


class UncheckedRecords(Recoverer):
    """Takes every record that its length and its sequence allow: no checksum of header or body."""

    def scan_segment(self, data: bytes, known_durable: int) -> Scan:
        """The records of a segment, by their lengths and sequences alone."""
        begin = scan(data[:SEGMENT_BYTES])
        records, at = [], SEGMENT_BYTES
        while at + FRAME_BYTES <= len(data):
            length, sequence = (int.from_bytes(data[at + low : at + high], "little") for low, high in ((4, 8), (8, 16)))
            end = at + FRAME_BYTES + length
            if sequence != begin.first + len(records) or end > len(data):
                break
            records.append(JournalRecord(sequence, data[at + FRAME_BYTES : end], end))
            at = end
        return Scan(begin.first, begin.salt, tuple(records), len(data) - at, known_durable)


class UncheckedParts(Recoverer):
    """Takes the parts that a manifest lists as they are."""

    def check_parts(self, manifest: Manifest, parts: Mapping[str, bytes]) -> None:
        """Check nothing."""


class AlteredDisk(WatchedDisk):
    """A disk that does something else than it is asked to.

    Args:
        disk: takes the altered steps.
        alter: steps that belong together → steps.
    """

    def __init__(self, disk: Disk, alter: Callable[[list[DiskStep]], list[DiskStep]]) -> None:
        super().__init__(disk)
        self._alter = alter

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take the altered steps."""
        super().run(self._alter(list(steps)))


class DeafDisk(WatchedDisk):
    """A disk that syncs again if that fails, and then believes it."""

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps, some of them twice."""
        for step in steps:
            try:
                super().run([step])
            except SyncFailed:
                super().run([step])


def _without(skipped: Callable[[DiskStep], bool]) -> Callable[[Disk], Disk]:
    return lambda disk: AlteredDisk(disk, lambda steps: [step for step in steps if not skipped(step)])


def _syncs(prefix: str, suffix: str = "") -> Callable[[DiskStep], bool]:
    """Whether a step syncs a file of such a name; without a suffix, a file that has its own name already."""

    def is_such(step: DiskStep) -> bool:
        if not isinstance(step, SyncFile) or not step.name.startswith(prefix):
            return False
        return step.name.endswith(suffix) if suffix else not step.name.endswith(TEMPORARY)

    return is_such


def _manifest_first(steps: list[DiskStep]) -> list[DiskStep]:
    """The steps that publish a manifest in front of those that write its parts."""
    of_manifest = [getattr(step, "name", "").startswith(MANIFEST) for step in steps]
    begin = of_manifest.index(True) if any(of_manifest) else 0
    return [*steps[begin:], *steps[:begin]]


@dataclass(frozen=True)
class LeftOut:
    """A rule that is left out.

    Args:
        name: what is not done.
        altered: what stands between the store and its disk.
        recoverer: what reads the disk.
        failing_syncs: fsyncs of the run that fail, counted from 0.
    """

    name: str
    altered: Callable[[Disk], Disk] = lambda disk: disk
    recoverer: Callable[[Disk], Recoverer] = Recoverer
    failing_syncs: tuple[int, ...] = ()


RULES = (
    LeftOut(KEPT),
    LeftOut("no checksum of records", recoverer=UncheckedRecords),
    LeftOut("acknowledged without fsync of the log", _without(_syncs(LOG))),
    LeftOut("renamed without fsync of the file", _without(_syncs("", TEMPORARY))),
    LeftOut("no fsync of the folder", _without(lambda step: isinstance(step, SyncFolder))),
    LeftOut("manifest first", lambda disk: AlteredDisk(disk, _manifest_first)),
    LeftOut("parts not checked", recoverer=UncheckedParts),
    LeftOut("manifest first, parts not checked", lambda disk: AlteredDisk(disk, _manifest_first), UncheckedParts),
    LeftOut("one fsync fails, every rule kept", failing_syncs=(3,)),
    LeftOut("one fsync fails, and is tried again", DeafDisk, failing_syncs=(3,)),
)


def without_each_rule(
    changes: Sequence[Change] = SMALL_RUN, rules: Sequence[LeftOut] = RULES, page_size: int = 64, limit: int = 4096
) -> dict[str, CrashTally]:
    """For each rule, all states that a power cut may leave if the rule is left out, counted by outcome.

    Args:
        changes: what the store does.
        rules: to leave out, one after the other.
        page_size: bytes that the disk writes whole or not at all.
        limit: states a point in the run; more are chosen by chance.
    """
    tallies = {}
    for rule in rules:
        disk = partial(FaultyDisk, page_size=page_size, failing_syncs=rule.failing_syncs)
        run = record_run(changes, disk, rule.altered, rule.recoverer)
        tallies[rule.name] = crash_everywhere(run, partial(outcome_of, recoverer=rule.recoverer), limit)
    return tallies
