"""The buffer of a rank's trace as data: its layout, and what can be read of it after the rank is gone.

header   magic, rank, pid, capacity, rows, spans lost, bytes of names
names    64 KiB: a length of two bytes and UTF-8, each name once; the first is the machine's
rows     time in ns, code (kind in the lowest two bits, then the number of the name), three numbers
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<8sqqqqqq")
ROW = struct.Struct("<qqqqq")
NAMES = 2**16  # bytes for names
MAGIC = b"ranktrc1"
BEGIN, END, COUNT = 0, 1, 2
KIND_BITS = 2


@dataclass(frozen=True)
class TraceRow:
    """One row: a span begins, the innermost open span ends, or a counter has a value.

    Args:
        kind: BEGIN, END or COUNT.
        time_ns: on the rank's clock.
        name: of the span or counter; empty for an end.
        value: of a counter.
        group: of a collective; None for any other span.
        number: of a collective in its group, or which step this is; None if it has none.
        num_bytes: that a collective moves.
    """

    kind: int
    time_ns: int
    name: str
    value: int = 0
    group: str | None = None
    number: int | None = None
    num_bytes: int = 0


@dataclass(frozen=True)
class Recording:
    """What one rank has recorded.

    Args:
        rank, host, pid: whose it is.
        rows: in the order in which they were written.
        lost: spans and values for which the buffer had no room.
    """

    rank: int
    host: str
    pid: int
    rows: tuple[TraceRow, ...]
    lost: int = 0


def load_recording(path: Path) -> Recording:
    """The recording of a file, of a rank that may be running or dead.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        return read_recording(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_recording(buffer) -> Recording:
    """The recording in a buffer.

    Args:
        buffer: bytes, bytearray or mmap.

    Raises:
        ValueError: if the buffer is none of a RankTrace, or was cut.
    """
    if len(buffer) < HEADER.size:
        raise ValueError(f"the buffer of a RankTrace has at least {HEADER.size} bytes, got {len(buffer)}")
    magic, rank, pid, capacity, count, lost, names_end = HEADER.unpack_from(buffer)
    if magic != MAGIC:
        raise ValueError(f"the buffer of a RankTrace begins with {MAGIC!r}, got {bytes(magic)!r}")
    size = HEADER.size + NAMES + capacity * ROW.size
    if len(buffer) < size or not 0 <= count <= capacity or not 0 <= names_end <= NAMES:
        raise ValueError(
            f"{count} rows of {capacity} and {names_end} bytes of names need {size} bytes, the buffer has {len(buffer)}"
        )
    names, start = _names(buffer, names_end), HEADER.size + NAMES
    rows = bytes(memoryview(buffer)[start : start + count * ROW.size])
    host = names[0] if names else ""  # the rank was killed before it wrote that
    return Recording(rank, host, pid, tuple(_row(names, *values) for values in ROW.iter_unpack(rows)), lost)


def _names(buffer, end: int) -> list[str]:
    found, place = [], 0
    while place < end:
        (length,) = struct.unpack_from("<H", buffer, HEADER.size + place)
        place += 2 + length
        found.append(bytes(buffer[HEADER.size + place - length : HEADER.size + place]).decode(errors="replace"))
    return found


def _row(names: list[str], time_ns: int, code: int, first: int, second: int, third: int) -> TraceRow:
    kind, name = code & (1 << KIND_BITS) - 1, names[code >> KIND_BITS]
    if kind == END:
        return TraceRow(END, time_ns, "")
    if kind == COUNT:
        return TraceRow(COUNT, time_ns, name, value=first)
    group = names[first - 1] if first else None
    return TraceRow(BEGIN, time_ns, name, group=group, number=None if second < 0 else second, num_bytes=third)
