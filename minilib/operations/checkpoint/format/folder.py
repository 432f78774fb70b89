"""The folder of checkpoints: names of its files, what is committed in it, and the steps that commit and retire.

    manifest-000000000040              step 40 is a checkpoint: published last, it says what the parts hold
    part-000000000040-00003            what rank 3 wrote for it
    part-000000000060-00000            no manifest holds it: a save that was not finished, or is not yet

There is no file that says which is the latest. The latest is the newest manifest, so it cannot run ahead of the data.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minilib.classic.write_ahead_log.disks.real_disk import RealDisk
from minilib.mechanisms.journaling import (
    TEMPORARY,
    Disk,
    DiskStep,
    Manifest,
    ManifestDamaged,
    PartDamaged,
    RemoveFile,
    SyncFolder,
    numbered,
    numbers_of,
    publish,
    retained,
    retire,
)
from minilib.operations.checkpoint.format.table import StoredTensor, packed_table, unpacked_table
from minilib.operations.checkpoint.format.writing import CRC_BYTES, agrees, part_entry

MANIFEST, PART = "manifest", "part"


class NoCheckpoint(FileNotFoundError):
    """A folder has no checkpoint, or not the one that was asked for; the message lists those that it has."""


class RangedDisk(Disk, Protocol):
    """A disk that also reads a part of a file; see `RangeSource`."""

    def read_into(self, name: str, offset: int, into: memoryview) -> int:
        """Read bytes of a file from an offset on; returns how many there are."""


class CheckpointFolder(RealDisk):
    """A folder on this machine, or on a file system that all hosts mount, to which every rank writes its own files.

    Args:
        folder: one that is there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, locked=False)
        self._path = folder

    def read_into(self, name: str, offset: int, into: memoryview) -> int:
        """See `RangedDisk`."""
        with (self._path / name).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
        return done


@dataclass(frozen=True)
class Committed:
    """What a manifest says.

    Args:
        step: of the run.
        table: where each tensor lies.
        values: of each state, by its name.
        checksums: part → 4 bytes a block.
        sizes: part → bytes.
        block_bytes: of a block.
        world_size: ranks that wrote.
    """

    step: int
    table: Mapping[str, StoredTensor]
    values: Mapping[str, Mapping]
    checksums: Mapping[str, bytes]
    sizes: Mapping[str, int]
    block_bytes: int
    world_size: int

    def packed(self) -> bytes:
        """The bytes of the manifest."""
        parts = {part: part_entry(size, self.checksums[part]) for part, size in self.sizes.items()}
        notes = {
            "table": packed_table(self.table),
            "values": self.values,
            "checksums": {part: checksums.hex() for part, checksums in self.checksums.items()},
            "block_bytes": self.block_bytes,
            "world_size": self.world_size,
        }
        return Manifest(self.step, parts, notes).packed()

    @classmethod
    def unpacked(cls, data: bytes, name: str) -> Committed:
        """The inverse of `packed`.

        Raises:
            ManifestDamaged: if the manifest is not whole, or does not agree with itself.
            UnknownFormat: if it is of another version.
            StateMismatch: if this torch lacks a dtype.
        """
        manifest = Manifest.unpacked(data, name)
        notes, sizes = manifest.notes, {part: entry.size for part, entry in manifest.parts.items()}
        if "table" not in notes:
            raise ManifestDamaged(f"{name} is whole, and no manifest of a checkpoint: it has no table of tensors")
        checksums = {part: bytes.fromhex(text) for part, text in notes["checksums"].items()}
        found = cls(manifest.number, unpacked_table(notes["table"]), notes["values"], checksums, sizes,
                    notes["block_bytes"], notes["world_size"])  # fmt: skip
        found.check_invariants(name)
        return found

    def check_invariants(self, name: str = "this manifest") -> None:
        """The boxes of each tensor are all of it and lie within their parts, and every block has a checksum.

        Raises:
            ManifestDamaged: if not.
        """
        for part, size in self.sizes.items():
            if len(self.checksums.get(part, b"")) != -(-size // self.block_bytes) * CRC_BYTES:
                raise ManifestDamaged(f"{name} has not one checksum for each block of {part}")
        for tensor, stored in self.table.items():
            try:
                stored.check_whole(tensor)
            except ValueError as error:
                raise ManifestDamaged(f"{name} lies: {error}") from error
            for box, part, offset in stored.boxes:
                if not 0 <= offset <= offset + box.numel * stored.dtype.itemsize <= self.sizes.get(part, -1):
                    raise ManifestDamaged(f"{name} lies: {box} of {tensor} at byte {offset} is not within {part}")


def part_name(step: int, rank: int) -> str:
    """The file that a rank writes for a step."""
    return f"{numbered(PART, step)}-{rank:05d}"


def committed_steps(disk: Disk) -> list[int]:
    """Steps with a manifest, in order; whether it is whole shows when it is read."""
    return numbers_of(MANIFEST, disk.names())


def read_committed(disk: Disk, step: int | None = None) -> Committed:
    """What the newest manifest says, or that of a step.

    Raises:
        NoCheckpoint: if there is none.
        ManifestDamaged, UnknownFormat, StateMismatch: as `Committed.unpacked`.
    """
    steps = committed_steps(disk)
    wanted = max(steps, default=None) if step is None else step
    if wanted not in steps:
        asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise NoCheckpoint(f"the folder has {asked}: manifests there are of the steps {steps or 'none'}")
    name = numbered(MANIFEST, wanted)
    found = Committed.unpacked(disk.read(name), name)
    if found.step != wanted:
        raise ManifestDamaged(f"{name} says that it is of step {found.step}")
    return found


def commit_steps(committed: Committed) -> list[DiskStep]:
    """Make a checkpoint of parts whose bytes are durable. Cost: three fsyncs."""
    return [SyncFolder(), *publish(numbered(MANIFEST, committed.step), committed.packed())]


def steps_to_keep(steps: Collection[int], keep: int, every: int = 0) -> list[int]:
    """Which checkpoints stay: the newest `keep`, and those whose step is a multiple of `every`; 0 for none of those.

    Raises:
        ValueError: if keep is below 1, or every negative.
    """
    if every < 0:
        raise ValueError(f"every is a number of steps, or 0 for no checkpoint that stays for good; got {every!r}")
    milestones = {step for step in steps if every and step % every == 0}
    return sorted(milestones | set(retained(steps, keep)))


def retire_steps(disk: Disk, step: int) -> list[DiskStep]:
    """Remove a checkpoint, its manifest first and for good, and then whatever has the name of a part of it."""
    return retire(numbered(MANIFEST, step), _parts_of(step, disk.names()))


def leftover_steps(names: Sequence[str]) -> list[DiskStep]:
    """Remove what no manifest holds: temporary files, and parts of saves that were not finished."""
    held = numbers_of(MANIFEST, names)
    ours = [name for name in names if name.startswith((f"{PART}-", f"{MANIFEST}-"))]
    kept = {name for step in held for name in (numbered(MANIFEST, step), *_parts_of(step, names))}
    return [RemoveFile(name) for name in ours if name not in kept and _is_ours(name)]


def check_parts(disk: RangedDisk, committed: Committed) -> None:
    """Read all parts of a checkpoint and hold each block against its checksum.

    Raises:
        PartDamaged: for the first part that is missing, short, long or changed.
    """
    for part, size in committed.sizes.items():
        if part not in disk.names():
            raise PartDamaged(f"{part} is missing, and the manifest says {size:,} bytes")
        block, sums = memoryview(bytearray(committed.block_bytes)), committed.checksums[part]
        for number, at in enumerate(range(0, size, len(block))):
            data = block[: disk.read_into(part, at, block[: size - at])]
            if len(data) < min(len(block), size - at) or not agrees(data, number, sums):
                raise PartDamaged(f"{part} is damaged or short at byte {at:,}")


def json_error(values: Mapping[str, Mapping]) -> str:
    """Which state has values that JSON cannot say; empty if none has."""
    for name, each in values.items():
        try:
            json.dumps(each, allow_nan=True)
        except (TypeError, ValueError) as error:
            return f"the values of {name!r} are not such as JSON can say: {error}"
    return ""


def _parts_of(step: int, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{numbered(PART, step)}-")]


def _is_ours(name: str) -> bool:
    kind, _, rest = name.removesuffix(TEMPORARY).partition("-")
    return kind in (MANIFEST, PART) and all(number.isdigit() for number in rest.split("-"))
