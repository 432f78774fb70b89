"""Checksummed records in segments of a log, and the longest valid beginning of a segment's bytes.

    segment   │ magic 8 │ version 4 │ first sequence 8 │ salt 4 │ CRC-32 4 │ frame │ frame │ …
    frame     │ salt 4 │ length 4 │ sequence 8 │ durable 8 │ CRC-32 of the body 4 │ CRC-32 of the header 4 │ body │

A power cut leaves any part of what was written since the last fsync, so a segment may end in a torn tail, which was
never acknowledged and is cut off. A damaged record that was acknowledged is another matter, and must not be cut off in
silence with everything behind it. Each frame tells how many records were durable when it was written: a whole frame
behind the damage that counts the damaged record among these proves that this record was acknowledged once. A segment
that ends in its last group has no such witness; there the caller may know better (`known_durable`).

Sources: SQLite, "Database File Format", 4.1 (a salt in each frame, so that older bytes never pass for new ones);
etcd, package wal, and RocksDB, WALRecoveryMode (a torn tail told from damage).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

VERSION = 1
MAX_BODY = 1 << 26  # bytes of a record
MAGIC = b"journal\n"
_SEGMENT = struct.Struct("<8sIQI")
_FRAME = struct.Struct("<IIQQI")
_CRC = struct.Struct("<I")
SEGMENT_BYTES = _SEGMENT.size + _CRC.size
FRAME_BYTES = _FRAME.size + _CRC.size  # in front of each body


class JournalDamaged(ValueError):
    """Bytes that were durable are not what was written: the disk or somebody else changed them."""


class UnknownFormat(ValueError):
    """The bytes are of another program, or of another version of this format."""


class RecordDamaged(JournalDamaged):
    """A record that was acknowledged is damaged; the records before it are whole.

    Args:
        message: how this is known.
        sequence: of the record.
        offset: bytes of the segment in front of it.
    """

    def __init__(self, message: str, sequence: int, offset: int) -> None:
        super().__init__(message)
        self.sequence, self.offset = sequence, offset


class JournalRecord(NamedTuple):
    """A record that was found whole.

    Args:
        sequence: its number in the whole log, from 0.
        body: its bytes.
        end: bytes of the segment up to its end.
    """

    sequence: int
    body: bytes
    end: int


@dataclass(frozen=True)
class Scan:
    """The longest valid beginning of a segment.

    Args:
        first: sequence of the segment's first record.
        salt: of the segment.
        records: those found whole, in order.
        torn_bytes: bytes behind them.
        num_durable: records of the whole log that are known to have been durable.
    """

    first: int
    salt: int
    records: tuple[JournalRecord, ...]
    torn_bytes: int
    num_durable: int

    @property
    def end(self) -> int:
        """Bytes of the header and of the whole records."""
        return self.records[-1].end if self.records else SEGMENT_BYTES

    @property
    def next_sequence(self) -> int:
        """Sequence of the record that follows."""
        return self.first + len(self.records)

    @property
    def durable_end(self) -> int:
        """Bytes of the header and of the records known to have been durable; what follows may be in memory alone."""
        known = min(self.num_durable, self.next_sequence) - self.first
        return self.records[known - 1].end if known > 0 else SEGMENT_BYTES


def segment_header(first: int, salt: int) -> bytes:
    """The beginning of a segment.

    Args:
        first: sequence of its first record, 0 or more.
        salt: 32 bits by chance, other ones for each segment.
    """
    fields = _SEGMENT.pack(MAGIC, VERSION, first, salt)
    return fields + _CRC.pack(crc32(fields))


def frame(body: bytes, sequence: int, durable: int, salt: int) -> bytes:
    """A record as it is stored.

    Args:
        body: its bytes, at most MAX_BODY.
        sequence: its number in the whole log, from 0.
        durable: records of the log that are durable now, at most `sequence`.
        salt: of its segment.

    Raises:
        ValueError: if the body is too long, or more is durable than was written.
    """
    if len(body) > MAX_BODY:
        raise ValueError(f"a record has at most {MAX_BODY:,} bytes, got {len(body):,}; store it in parts")
    if not 0 <= durable <= sequence:
        raise ValueError(f"record {sequence} is the next one, so 0 to {sequence} are durable; got {durable}")
    header = _FRAME.pack(salt, len(body), sequence, durable, crc32(body))
    return header + _CRC.pack(crc32(header)) + body


def scan(data: bytes, known_durable: int = 0) -> Scan:
    """Find the longest valid beginning of a segment.

    Args:
        data: all bytes of the segment.
        known_durable: records of the whole log that the caller knows to have been durable, such as all records in
            front of the next segment.

    Raises:
        UnknownFormat: if it is no segment, or one of another version.
        JournalDamaged: if its header is damaged; a segment gets its name only once the header is durable.
        RecordDamaged: if a record is damaged that is known to have been durable.

    Cost: O(bytes).
    """
    first, salt = _read_header(data)
    records: list[JournalRecord] = []
    at, durable = SEGMENT_BYTES, known_durable
    while (header := _header_at(data, at, salt)) and header.sequence == first + len(records):
        start, end = at + FRAME_BYTES, at + FRAME_BYTES + header.length
        body = data[start:end]
        if len(body) < header.length or crc32(body) != header.crc:
            break
        records.append(JournalRecord(header.sequence, body, end))
        at, durable = end, max(durable, header.durable)
    found = Scan(first, salt, tuple(records), len(data) - at, durable)
    _refuse_damage(data, found)
    return found


class _Header(NamedTuple):
    length: int
    sequence: int
    durable: int
    crc: int


def _read_header(data: bytes) -> tuple[int, int]:
    """First sequence and salt of a segment."""
    if len(data) < SEGMENT_BYTES:
        raise JournalDamaged(f"a segment begins with {SEGMENT_BYTES} bytes of header, and here are {len(data)} bytes")
    magic, version, first, salt = _SEGMENT.unpack_from(data)
    if _CRC.unpack_from(data, _SEGMENT.size)[0] == crc32(data[: _SEGMENT.size]):
        if magic == MAGIC and version == VERSION:
            return first, salt
    elif magic == MAGIC:
        raise JournalDamaged("the header of the segment does not agree with its checksum")
    raise UnknownFormat(
        f"this program reads {MAGIC!r} in version {VERSION}, and the segment says {magic!r}, version {version}"
    )


def _header_at(data: bytes, at: int, salt: int) -> _Header | None:
    """The frame header at this place, if there is a whole one of this segment."""
    if len(data) < at + FRAME_BYTES:
        return None
    found_salt, length, sequence, durable, crc = _FRAME.unpack_from(data, at)
    if found_salt != salt or _CRC.unpack_from(data, at + _FRAME.size)[0] != crc32(data[at : at + _FRAME.size]):
        return None
    return _Header(length, sequence, durable, crc)


def _headers_from(data: bytes, at: int, salt: int) -> Iterator[_Header]:
    """All whole frame headers from this place on."""
    mark = salt.to_bytes(4, "little")
    while (at := data.find(mark, at)) >= 0:
        if header := _header_at(data, at, salt):
            yield header
        at += 1


def _refuse_damage(data: bytes, found: Scan) -> None:
    """Raise RecordDamaged if the record behind the whole ones is known to have been durable."""
    missing, at = found.next_sequence, found.end
    torn = _header_at(data, at, found.salt)
    if torn and torn.sequence == missing:
        at += FRAME_BYTES + torn.length  # what its body holds is the writer's affair, even if it looks like a frame
    witness = max((header.durable for header in _headers_from(data, at, found.salt)), default=0)
    if max(witness, found.num_durable) > missing:
        how = "a later record says so" if witness > missing else "as the caller knows"
        raise RecordDamaged(
            f"record {missing}, at byte {found.end}, was durable once ({how}) and is damaged or missing now: this is "
            f"no torn tail; get the log from a copy, or cut it at byte {found.end} and lose what follows",
            missing,
            found.end,
        )
