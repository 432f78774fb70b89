"""Read the recordings of ranks without their help: they may be dead, stopped, or hang and hold the GIL."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

from minilib.mechanisms.telemetry.ring import RingRecord
from minilib.operations.flight_recorder.recorder import (
    ASYNCHRONOUS,
    CALL,
    ENDED,
    HEAD,
    MAGIC,
    REFUSED,
    STARTED,
    VERSION,
    WAITED,
    group_of_text,
    recording_bytes,
    rings,
)
from minilib.operations.flight_recorder.recording import Dump, RecordedCall, RecordedGroup, process_state

_FIXED = CALL[0]


class NotARecording(ValueError):
    """A file or buffer that is no recording, or one whose recorder has not begun."""


def read_dump(where: Path | str | bytes | bytearray | mmap.mmap) -> Dump:
    """Read one rank's recording, also while that rank writes.

    Args:
        where: the file, or its content.

    Raises:
        NotARecording: if it is none.
    """
    content = memoryview(_mapped(Path(where)) if isinstance(where, Path | str) else where)
    source = where if isinstance(where, Path | str) else "the buffer"
    if len(content) < HEAD.size:
        raise NotARecording(f"{source}: a recording begins with {HEAD.size} bytes of head, and here are {len(content)}")
    magic, version, rank, capacity, process, started, closed, _ = HEAD.unpack_from(content)
    if magic != MAGIC or version != VERSION:
        raise NotARecording(
            f"{source}: no recording of version {VERSION}, or none whose recorder has begun: {content[:16].hex()}"
        )
    if len(content) < recording_bytes(capacity):
        raise NotARecording(f"{source} was cut: {capacity} calls take {recording_bytes(capacity)} bytes, and here are "
                            f"{len(content)}")  # fmt: skip
    _, name_ring, calls = rings(content, capacity)
    alive, now = process_state(process, started), time.monotonic_ns()
    entries = calls.entries()
    lost = entries[-1].sequence + 1 - len(entries) if entries else 0
    names, groups, entered = _names(name_ring.entries())
    return Dump(
        rank=rank,
        calls=tuple(_call(entry, names, groups, now) for entry in entries),
        entered=entered,
        lost=lost,
        read_ns=now,
        closed=bool(closed),
        process=alive,
    )


def read_dumps(folder: Path | str, pattern: str = "*") -> list[Dump]:
    """Read the recordings in a folder, in order of ranks; other files are an error."""
    return sorted((read_dump(path) for path in Path(folder).glob(pattern)), key=lambda dump: dump.rank)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise NotARecording(f"{path} is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _names(entries: list[RingRecord]) -> tuple[dict[int, str], dict[int, RecordedGroup], dict[RecordedGroup, int]]:
    """Texts and groups by number, and how many calls of each group there were."""
    pieces: dict[int, bytes] = {}
    first = 0
    for entry in entries:
        if entry.body.startswith(b"+"):
            pieces[first] += entry.body[1:]
        else:
            first = entry.sequence
            pieces[first] = entry.body[1:]
    names = {number: content.decode(errors="replace") for number, content in pieces.items()}
    groups = {number: group for number, text in names.items() if (group := group_of_text(text))}
    marks = {entry.sequence: entry.marks[0] for entry in entries}
    return names, groups, {group: marks[number] for number, group in groups.items()}


def _call(entry: RingRecord, names: dict[int, str], groups: dict[int, RecordedGroup], now: int) -> RecordedCall:
    group, kind, site, flags, dims, sequence, enqueued = _FIXED.unpack_from(entry.body)
    *_, shape = (*CALL[dims].unpack(entry.body)[:7], CALL[dims].unpack(entry.body)[7:])
    op, reduce_op, root, dtype = (names.get(kind, "?") + "|||").split("|")[:4]
    started, ended, waited = (entry.marks[which] for which in (STARTED, ENDED, WAITED))
    asynchronous = bool(flags & ASYNCHRONOUS)
    open_now = not ended
    return RecordedCall(
        group=groups.get(group, RecordedGroup("?", ())),
        sequence=sequence,
        op=op,
        reduce_op=reduce_op,
        root=int(root) if root else None,
        dtype=dtype,
        shape=shape,
        site=names.get(site, "?"),
        state=_state(started, ended),
        asynchronous=asynchronous,
        enqueued_ns=enqueued,
        started_ns=started,
        ended_ns=abs(ended) if ended != REFUSED else 0,
        wait_ns=_waited(waited, now) if asynchronous else (now if open_now else abs(ended)) - enqueued,
        waiting=waited < 0 if asynchronous else open_now,
    )


def _state(started: int, ended: int) -> str:
    if ended == REFUSED:
        return "refused"
    if ended:
        return "completed" if ended > 0 else "failed"
    return "started" if started else "scheduled"


def _waited(waited: int, now: int) -> int:
    return waited if waited >= 0 else now + waited
