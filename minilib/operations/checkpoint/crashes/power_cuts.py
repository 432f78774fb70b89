"""Power cuts at every step of saves, on a simulated disk.

Each state that the disk may be in is recovered as a new run would, and held against what was acknowledged. The steps
are those of the library; two ranks write their parts in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from minilib.classic.write_ahead_log.crashes.power_cuts import (
    LOST,
    REFUSED,
    TORN,
    WHOLE,
    CrashTally,
    History,
    RecordedRun,
    WatchedDisk,
    crash_everywhere,
)
from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk, Files
from minilib.mechanisms.journaling import Disk, DiskStep, JournalDamaged, SyncFolder, WriteFile
from minilib.operations.checkpoint.format.folder import (
    Committed,
    commit_steps,
    committed_steps,
    leftover_steps,
    part_name,
    read_committed,
    retire_steps,
    steps_to_keep,
)
from minilib.operations.checkpoint.format.reading import PartReader
from minilib.operations.checkpoint.format.table import Fragment
from minilib.operations.checkpoint.format.writing import PartContents, part_steps, staged_blocks
from minilib.operations.checkpoint.plan import SavePlan
from minilib.operations.checkpoint.states.cuts import replica_state
from minilib.operations.checkpoint.states.shares import held_by, shares_of

PAGE, BLOCK_BYTES = 1024, 128  # bytes; a part has one or two pages, a manifest two, so that all states can be tried
SIZES = (150, 1)  # elements of the tensors


class RangedFaultyDisk(FaultyDisk):
    """A simulated disk that reads parts of files."""

    def read_into(self, name: str, offset: int, into: memoryview) -> int:
        """See `RangedDisk`."""
        data = self.read(name)[offset : offset + len(into)]
        into[: len(data)] = data
        return len(data)


def cut_saves(
    steps: Sequence[int] = (1, 2, 3),
    world_size: int = 2,
    keep: int = 1,
    altered: Callable[[Disk], Disk] = lambda disk: disk,
    limit: int = 4096,
) -> CrashTally:
    """Save a few times, cut the power after every step of the disk, and recover every state that it may be in.

    Args:
        steps: of the saves.
        world_size: ranks that write.
        keep: checkpoints to keep.
        altered: puts something between the saves and the disk, such as a rule left out.
        limit: states a point; more are chosen by chance.
    """
    make = partial(RangedFaultyDisk, page_size=PAGE)
    watched = _CopyingDisk(make())
    disk, acknowledged, history = altered(watched), [(0, 0)], {0: {}}
    for step in steps:
        history[step] = _values(step)
        for each in _save(disk, step, world_size):
            disk.run([each])
        acknowledged.append((len(watched.steps), step))
        for old in set(committed_steps(disk)) - set(steps_to_keep(committed_steps(disk), keep)):
            disk.run(retire_steps(disk, old))
    run = RecordedRun(make, tuple(watched.steps), tuple(acknowledged), history)
    return crash_everywhere(run, recovered_outcome, limit)


def recovered_outcome(files: Files, acknowledged: int, history: History) -> str:
    """What a new run makes of the files that a power cut has left: one of `power_cuts.OUTCOMES`."""
    disk = RangedFaultyDisk(files, page_size=PAGE)
    disk.run([*leftover_steps(disk.names()), SyncFolder()])
    latest = max(committed_steps(disk), default=0)
    if latest < acknowledged:
        return LOST
    if not latest:
        return WHOLE
    tensors = [torch.zeros(size) for size in SIZES]
    try:
        committed = read_committed(disk)
        reader = PartReader(disk, committed.checksums, committed.sizes, committed.block_bytes)
        reader.read(_fragments(tensors), committed.table)
    except JournalDamaged:
        return REFUSED
    return WHOLE if _as_bytes(tensors) == history[latest] else TORN


class _CopyingDisk(WatchedDisk):
    """Keeps copies of what is written: buffers are used again."""

    def run(self, steps: Sequence[DiskStep]) -> None:
        super().run(WriteFile(s.name, bytes(s.data), s.offset) if isinstance(s, WriteFile) else s for s in steps)


def _save(disk: Disk, step: int, world_size: int) -> Iterator[DiskStep]:
    """The steps of a save on ranks that hold the same, their parts in turns."""
    fragments = _fragments(_tensors(step))
    holdings = [held_by(fragments)] * world_size
    plan = SavePlan(holdings, [PartContents.of(share) for share in shares_of(holdings)])
    names = [part_name(step, rank) for rank in range(world_size)]
    checksums = [bytearray() for _ in names]
    writers = [
        part_steps(name, staged_blocks(part, part.views(fragments), BLOCK_BYTES), sums)
        for name, part, sums in zip(names, plan.parts, checksums, strict=True)
    ]
    while writers:
        for writer in list(writers):
            each = next(writer, None)
            if each is None:
                writers.remove(writer)
            else:
                yield each
    sizes = {name: part.size for name, part in zip(names, plan.parts, strict=True)}
    sums = {name: bytes(each) for name, each in zip(names, checksums, strict=True)}
    yield from commit_steps(Committed(step, plan.table(step), {}, sums, sizes, BLOCK_BYTES, world_size))


def _tensors(step: int) -> list[Tensor]:
    return [torch.arange(size, dtype=torch.float32) + 1000 * step for size in SIZES]


def _fragments(tensors: Sequence[Tensor]) -> list[Fragment]:
    model = nn.Module()
    for number, tensor in enumerate(tensors):
        model.register_buffer(f"tensor{number}", tensor)
    return replica_state(model).fragments()


def _values(step: int) -> dict[bytes, bytes]:
    return _as_bytes(_tensors(step))


def _as_bytes(tensors: Sequence[Tensor]) -> dict[bytes, bytes]:
    return {b"%d" % number: tensor.numpy().tobytes() for number, tensor in enumerate(tensors)}
