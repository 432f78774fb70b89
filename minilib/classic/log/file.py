"""An append-only file of records that survives being cut off in the middle of a write.

    │ length, 4 bytes │ CRC-32, 4 bytes │ record │ length │ CRC-32 │ record │ …

The CRC covers the length, the record, and the CRC of the record before. So the last one vouches for the whole file: two
logs with as many records and the same last CRC are equal (but for one chance in 2³²), and a stream of records in which
one is missing or comes twice does not pass.

Source: etcd, package wal (length-prefixed records, a rolling CRC, a torn tail that is cut off when the file is opened).
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

HEADER = struct.Struct("!II")  # bytes of the record, CRC
MAX_RECORD = 1 << 26  # bytes; a length beyond it is no length
PIECE = 1 << 18  # bytes read at a time


class LogCorrupt(ValueError):
    """A record is there and its CRC is wrong.

    Args:
        message: which one.
        end: bytes from its beginning to its end.
    """

    def __init__(self, message: str, end: int) -> None:
        super().__init__(message)
        self.end = end


class LogInUse(RuntimeError):
    """Somebody else has the file open."""


@dataclass(frozen=True)
class Batch:
    """Whole records that continue a log.

    Args:
        stored: their bytes, as in the file.
        ends: for each, the bytes up to its end.
        crcs: for each, its CRC.
    """

    stored: bytes
    ends: tuple[int, ...]
    crcs: tuple[int, ...]


class LogFile:
    """Records in a file, numbered from 0. Opening it cuts off a torn last record and locks it for this process.

    Args:
        path: made if it does not exist.
        fsync: have the disk confirm each write, so that it survives a power cut; without, it survives the process.

    Attributes:
        torn_bytes: bytes that were cut off when it was opened.

    Raises:
        LogInUse: if somebody has it open.
        LogCorrupt: if a record other than the last is damaged. Damage to a length can look like a torn end, and then
            everything behind it is cut off.

    Cost: opening reads the file once; 12 bytes of memory a record.
    """

    def __init__(self, path: Path, fsync: bool = False) -> None:
        self.path, self.fsync = path, fsync
        self._ends, self._crcs = array("Q"), array("I")
        self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self.torn_bytes = self._recover()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def size(self) -> int:
        """Bytes of all records as stored."""
        return self._end(len(self))

    @property
    def crc(self) -> int:
        """CRC of the last record, which vouches for all before it; 0 if there is none."""
        return self._crcs[-1] if self._crcs else 0

    def begins_with(self, count: int, crc: int) -> bool:
        """Whether a log of `count` records, the last of which has this CRC, is the beginning of this one."""
        return count <= len(self) and crc == (self._crcs[count - 1] if count else 0)

    def read(self, index: int) -> bytes:
        """A record.

        Raises:
            IndexError: if there is no such record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path.name} has {len(self)} records, and no record {index}")
        start, end = self._end(index) + HEADER.size, self._end(index + 1)
        return os.pread(self._file.fileno(), end - start, start)

    def stored_from(self, index: int) -> Iterator[bytes]:
        """The bytes of all records from `index` on, as stored, piece by piece."""
        for at in range(self._end(index), self.size, PIECE):
            yield os.pread(self._file.fileno(), min(PIECE, self.size - at), at)

    def pack(self, record: bytes) -> Batch:
        """A record as it will be stored if it is the next one.

        Raises:
            TypeError: if it is not bytes.
            ValueError: if it is longer than MAX_RECORD.
        """
        if not isinstance(record, bytes | bytearray | memoryview):
            raise TypeError(f"a record is bytes, got {type(record).__name__}")
        record = bytes(record)
        if len(record) > MAX_RECORD:
            raise ValueError(f"a record has at most {MAX_RECORD} bytes, got {len(record)}")
        crc = _crc(record, self.crc)
        stored = HEADER.pack(len(record), crc) + record
        return Batch(stored, (len(stored),), (crc,))

    def take(self, buffer: bytearray) -> Batch | None:
        """Take whole records that continue this log off the front of a buffer; None if the first is not all there.

        Raises:
            LogCorrupt: if the first one does not continue this log.
        """
        ends, crcs, end, crc = [], [], 0, self.crc
        with memoryview(buffer) as view:
            while len(view) - end >= HEADER.size:
                length, claimed = HEADER.unpack_from(view, end)
                start, stop = end + HEADER.size, end + HEADER.size + length
                if stop > len(view) and length <= MAX_RECORD:
                    break
                if length > MAX_RECORD or _crc(view[start:stop], crc) != claimed:
                    if ends:
                        break  # the good ones first; the next call meets it
                    raise LogCorrupt(f"{self.path.name}: record {len(self)} is damaged, or out of turn", stop)
                end, crc = stop, claimed
                ends.append(end)
                crcs.append(crc)
            stored = bytes(view[:end])
        del buffer[:end]
        return Batch(stored, tuple(ends), tuple(crcs)) if ends else None

    def write(self, batch: Batch) -> None:
        """Append what `pack` or `take` returned last.

        Raises:
            OSError: if the disk refuses; the file is as it was.

        Cost: one write and at most one fsync, however many records.
        """
        rest = memoryview(batch.stored)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            if self.fsync:
                os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self.size)
            raise
        self._index(batch)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def check_invariants(self) -> None:
        """The file holds the records that are counted, whole, and nothing else."""
        assert os.fstat(self._file.fileno()).st_size == self.size, "the file has a torn end, or lacks records"
        crc = 0
        for index in range(len(self)):
            crc = _crc(self.read(index), crc)
            assert crc == self._crcs[index], f"record {index} is damaged"

    def _end(self, count: int) -> int:
        """Where the first `count` records end."""
        return self._ends[count - 1] if count else 0

    def _index(self, batch: Batch) -> None:
        start = self.size
        self._ends.extend(start + end for end in batch.ends)
        self._crcs.extend(batch.crcs)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogInUse(f"{self.path.name} is open already; close that log first") from None

    def _recover(self) -> int:
        """Index the whole records and cut off a torn end; returns the bytes of that."""
        on_disk, buffer = os.fstat(self._file.fileno()).st_size, bytearray()
        self._file.seek(0)
        try:
            while piece := self._file.read(PIECE):
                buffer += piece
                while batch := self.take(buffer):
                    self._index(batch)
        except LogCorrupt as damage:
            if self.size + damage.end < on_disk:
                raise
        self._file.truncate(self.size)
        if self.fsync:
            os.fsync(self._file.fileno())
            self._sync_folder()
        return on_disk - self.size

    def _sync_folder(self) -> None:
        """Have the disk confirm that the file has a name."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _crc(record: bytes | memoryview, before: int) -> int:
    return crc32(record, crc32(len(record).to_bytes(4, "big"), before))
