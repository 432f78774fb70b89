"""Write, commit, retire: what a save does once its bytes stand still, in the foreground or behind the next steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from minilib.mechanisms.journaling import RemoveFile
from minilib.operations.checkpoint.background import SaveFailed
from minilib.operations.checkpoint.format.folder import (
    Committed,
    RangedDisk,
    commit_steps,
    committed_steps,
    part_name,
    retire_steps,
)
from minilib.operations.checkpoint.format.writing import part_steps
from minilib.operations.checkpoint.plan import SavePlan
from minilib.operations.checkpoint.together import told_by_all, tried
from minilib.ranks.collectives import Communicator

OpenDisk = Callable[[], AbstractContextManager[RangedDisk]]


@dataclass(frozen=True)
class SaveJob:
    """One save on one rank, from its bytes to its commit.

    Args:
        step: of the run.
        plan: who writes what.
        blocks: makes the blocks of this rank's part.
        values: of each state; rank 0's are saved.
        block_bytes: of a block.
        open_disk: opens the folder for a time.
        comm: between all ranks, none of whose collectives runs meanwhile; None on one process.
        kept: the steps to keep, of those that are committed.
    """

    step: int
    plan: SavePlan
    blocks: Callable[[], Iterable[memoryview]]
    values: Mapping[str, Mapping]
    block_bytes: int
    open_disk: OpenDisk
    comm: Communicator | None
    kept: Callable[[Collection[int]], Collection[int]]

    def run(self) -> None:
        """Do it all. A collective.

        Raises:
            SaveFailed: on every rank, if a rank could not do its part.
        """
        with self.open_disk() as disk:
            checksums = self._write(disk)
            self._commit(disk, checksums)
            self._retire(disk)

    @property
    def _rank(self) -> int:
        return 0 if self.comm is None else self.comm.rank

    def _write(self, disk: RangedDisk) -> list[bytes]:
        """This rank's part, until all ranks' are durable; returns the checksums of each."""
        checksums, name = bytearray(), part_name(self.step, self._rank)
        _, error = tried(lambda: disk.run(part_steps(name, self.blocks(), checksums)))
        try:
            told = self._together("writing its part", error, checksums.hex())
        except SaveFailed:  # all ranks have heard of it; after any other error rank 0 may publish the manifest
            with suppress(OSError):
                disk.run([RemoveFile(name)])
            raise
        return [bytes.fromhex(text) for text in told]

    def _commit(self, disk: RangedDisk, checksums: list[bytes]) -> None:
        error = None
        if self._rank == 0:
            names = [part_name(self.step, rank) for rank in range(len(checksums))]
            committed = Committed(
                self.step,
                self.plan.table(self.step),
                self.values,
                dict(zip(names, checksums, strict=True)),
                {name: part.size for name, part in zip(names, self.plan.parts, strict=True)},
                self.block_bytes,
                len(names),
            )
            _, error = tried(lambda: disk.run(commit_steps(committed)))
        self._together("publishing the manifest", error)

    def _retire(self, disk: RangedDisk) -> None:
        error = None
        if self._rank == 0:
            steps = committed_steps(disk)
            old = [step for step in steps if step not in self.kept(steps)]
            _, error = tried(lambda: [disk.run(retire_steps(disk, step)) for step in old])
        self._together("removing older checkpoints, though this one is durable,", error)

    def _together(self, doing: str, error: Exception | None, text: str = "") -> list[str]:
        """What each rank has to say, if none has an error."""
        mine = {"error": "" if error is None else f"{type(error).__name__}: {error}", "text": text}
        told = [json.loads(said) for said in told_by_all(json.dumps(mine), self.comm)]
        for rank, each in enumerate(told):
            if each["error"]:
                said = f"the save of step {self.step} failed: rank {rank}, {doing} met {each['error']}"
                raise SaveFailed(said) from error
        return [each["text"] for each in told]
