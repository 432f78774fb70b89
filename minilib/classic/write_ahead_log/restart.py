"""How a store starts again: the newest snapshot that is whole, the log behind it, and all that made durable.

What a process that was killed had written is in the kernel's memory, and reads find it, whether it is durable or not.
So recovery writes what is not known to be durable once more, cuts the torn tail off, and waits for the disk, before
anybody is told what the store holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from minilib.mechanisms.journaling import (
    TEMPORARY,
    CutFile,
    Disk,
    DiskStep,
    JournalDamaged,
    Manifest,
    PartDamaged,
    RemoveFile,
    Scan,
    SegmentMissing,
    SyncFile,
    SyncFolder,
    WriteFile,
    numbered,
    numbers_of,
    replay_order,
    scan,
)

LOG, SNAPSHOT, MANIFEST = "log", "snapshot", "manifest"
PUT, DELETE = b"+", b"-"
_KEY = struct.Struct("<cI")  # what is done, and bytes of the key


@dataclass
class Recovered:
    """What recovery found.

    Args:
        values: key → value.
        next_sequence: records of the log; the next one has this number.
        snapshot: records in the snapshot that it began with; 0 without one.
        segment: first record of the last segment; None if there was no log.
        salt: of that segment.
        end: bytes of that segment up to the end of the last whole record.
        replayed: records read from the log and applied.
        bytes_read: of manifests, snapshots and segments.
        torn_bytes: behind the last whole record.
        skipped: why newer snapshots were not taken, the newest first; the log has made up for them.
    """

    values: dict[bytes, bytes] = field(default_factory=dict)
    next_sequence: int = 0
    snapshot: int = 0
    segment: int | None = None
    salt: int = 0
    end: int = 0
    replayed: int = 0
    bytes_read: int = 0
    torn_bytes: int = 0
    skipped: tuple[str, ...] = ()


class Recoverer:
    """Reads a store back from a disk. Its checks are methods, so that it can be seen what happens without one.

    Args:
        disk: of the store.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._bytes_read = 0

    def scan_segment(self, data: bytes, known_durable: int) -> Scan:
        """The records of a segment."""
        return scan(data, known_durable)

    def check_parts(self, manifest: Manifest, parts: Mapping[str, bytes]) -> None:
        """Hold the parts of a snapshot against its manifest."""
        manifest.check(parts)

    def recover(self) -> Recovered:
        """Read everything and settle it.

        Raises:
            JournalDamaged: if something that was durable is damaged, and nothing older makes up for it.
            SegmentMissing: if a segment is gone that is needed.
            UnknownFormat: if a file is of another version.
        """
        found, tail = self._read_back()
        if found.segment is not None:
            self._disk.run(_settle(found, *tail))
        return found

    def look(self) -> Recovered:
        """Read everything, and change nothing; raises as `recover`."""
        return self._read_back()[0]

    def _read_back(self) -> tuple[Recovered, tuple[bytes, int]]:
        names = self._disk.names()
        segments, manifests = numbers_of(LOG, names), numbers_of(MANIFEST, names)
        self._bytes_read, tail = 0, (b"", 0)
        if not segments and not manifests:
            return Recovered(), tail
        found = self._begin(manifests, segments)
        for first, known_durable in replay_order(found.snapshot, segments):
            data = self._read(numbered(LOG, first))
            part = self.scan_segment(data, known_durable)
            if part.first != first or (known_durable and part.next_sequence != known_durable):
                raise JournalDamaged(
                    f"{numbered(LOG, first)} holds records {part.first} to {part.next_sequence}, and the names of the "
                    f"files say {first} to {known_durable or 'the end'}"
                )
            self._replay(found, part)
            found.segment, found.salt, found.end = first, part.salt, part.end
            found.torn_bytes, found.next_sequence = part.torn_bytes, part.next_sequence
            tail = data[part.durable_end : part.end], part.durable_end
        found.bytes_read = self._bytes_read
        return found, tail

    def _begin(self, manifests: list[int], segments: list[int]) -> Recovered:
        """The newest snapshot that is whole and that the log continues."""
        errors: list[ValueError] = []
        for number in [*reversed(manifests), 0]:
            try:
                replay_order(number, segments)
                values = self._snapshot(number) if number else {}
            except (JournalDamaged, SegmentMissing) as error:
                errors.append(error)
                continue
            return Recovered(values, snapshot=number, skipped=tuple(map(str, errors)))
        raise errors[0]

    def _snapshot(self, number: int) -> dict[bytes, bytes]:
        name = numbered(MANIFEST, number)
        manifest = Manifest.unpacked(self._read(name), name)
        if manifest.number != number:
            raise JournalDamaged(f"{name} says that it is number {manifest.number}")
        try:
            parts = {part: self._read(part) for part in manifest.parts}
        except FileNotFoundError as error:
            raise PartDamaged(f"a part that {name} lists is missing: {error}") from error
        self.check_parts(manifest, parts)
        return dict(pair for data in parts.values() for pair in _pairs(data))

    def _read(self, name: str) -> bytes:
        data = self._disk.read(name)
        self._bytes_read += len(data)
        return data

    @staticmethod
    def _replay(found: Recovered, part: Scan) -> None:
        for record in part.records:
            if record.sequence >= found.snapshot:
                apply_record(found.values, record.body)
                found.replayed += 1


def put_record(key: bytes, value: bytes) -> bytes:
    """The record of a value that a key gets."""
    return _KEY.pack(PUT, len(key)) + key + value


def delete_record(key: bytes) -> bytes:
    """The record of a key that goes."""
    return _KEY.pack(DELETE, len(key)) + key


def apply_record(values: dict[bytes, bytes], body: bytes) -> None:
    """Do once more what a record says."""
    what, length = _KEY.unpack_from(body)
    key, value = body[_KEY.size : _KEY.size + length], body[_KEY.size + length :]
    if what == PUT:
        values[key] = value
    elif what == DELETE:
        values.pop(key, None)
    else:
        raise JournalDamaged(f"a record begins with {what!r}, and it is {PUT!r} or {DELETE!r}")


def snapshot_of(values: Mapping[bytes, bytes]) -> bytes:
    """All values as one part of a snapshot: put records, each behind its length."""
    records = (put_record(key, value) for key, value in values.items())
    return b"".join(len(record).to_bytes(4, "little") + record for record in records)


def leftovers(names: list[str]) -> list[DiskStep]:
    """Steps that remove what no manifest holds: temporary files, and parts of a snapshot that was never committed."""
    committed = numbers_of(MANIFEST, names)
    parts = [numbered(SNAPSHOT, number) for number in numbers_of(SNAPSHOT, names) if number not in committed]
    ours = tuple(f"{kind}-" for kind in (LOG, SNAPSHOT, MANIFEST))
    return [RemoveFile(name) for name in names if name.startswith(ours) and name.endswith(TEMPORARY) or name in parts]


def _pairs(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        values: dict[bytes, bytes] = {}
        apply_record(values, data[at + 4 : at + 4 + length])
        yield from values.items()
        at += 4 + length


def _settle(found: Recovered, tail: bytes, tail_start: int) -> list[DiskStep]:
    """Steps after which all that was found is durable, and what was torn is gone for good."""
    name = numbered(LOG, found.segment)
    again = [WriteFile(name, tail, tail_start)] if tail else []
    cut = [CutFile(name, found.end)] if found.torn_bytes else []
    return [*again, *cut, SyncFile(name), SyncFolder()]
