"""SIGKILL amid saves: ranks that save and acknowledge, one of which is killed at a step of its disk, or at any moment.

Each round goes on in the folder that the round before left. After the kill the newest checkpoint is loaded and held
against what was acknowledged: its step is no earlier, and every value is that of its step.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minilib.mechanisms.journaling import DiskStep, WriteFile
from minilib.operations.checkpoint.checkpointer import Checkpointer
from minilib.operations.checkpoint.format.folder import CheckpointFolder, NoCheckpoint
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.shared import SharedMemoryTransport

SIZES = (700, 1, 64, 3000)  # elements of the tensors
BLOCK_BYTES = 2048
ACKNOWLEDGED = "acknowledged"  # a file beside the folder: a line for each save that was told to be durable


@dataclass(frozen=True)
class SaveKills:
    """What was found after all kills.

    Args:
        kills: ranks that were killed.
        acknowledged: saves that were told to be durable.
        lost: kills after which the newest checkpoint was older than one that was acknowledged.
        torn: kills after which it could not be loaded, or held other values than those of its step.
        unacknowledged: kills after which it was one that nobody had been told of; it may be.
    """

    kills: int
    acknowledged: int
    lost: int
    torn: int
    unacknowledged: int


@dataclass(frozen=True)
class KillPoint:
    """When a rank is killed: amid or in front of a step of its disk, or after some seconds.

    Args:
        rank: which.
        disk_step: counted from the beginning of the round; None for a moment.
        seconds: from the first save on, if there is no disk step.
        half: amid a write, half of whose bytes are written.
    """

    rank: int
    disk_step: int | None
    seconds: float = 0.0
    half: bool = False


class KilledFolder(CheckpointFolder):
    """A folder whose process is killed at one of its steps.

    Args:
        folder: one that is there.
        point: when.
        taken: how many steps were taken before, in a list of one number.
    """

    def __init__(self, folder: Path, point: KillPoint, taken: list[int]) -> None:
        super().__init__(folder)
        self._point, self._taken = point, taken

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps until the one at which the process ends."""
        for step in steps:
            if self._taken[0] == self._point.disk_step:
                if self._point.half and isinstance(step, WriteFile):
                    super().run([WriteFile(step.name, step.data[: len(step.data) // 2], step.offset)])
                os.kill(os.getpid(), signal.SIGKILL)
            self._taken[0] += 1
            super().run([step])


def kill_saves(
    folder: Path, num_kills: int, world_size: int = 1, wait: bool = False, seed: int = 0, most_steps: int = 60
) -> SaveKills:
    """Let ranks save, kill one of them, look at what is there; and again.

    Args:
        folder: an empty one.
        num_kills: rounds.
        world_size: ranks.
        wait: save in the foreground, not behind the steps.
        seed: of the moments.
        most_steps: of a rank's disk in a round before it is killed; a save takes about 20.
    """
    chance, checkpoints = random.Random(seed), folder / "checkpoints"
    told = lost = torn = unacknowledged = 0
    for _ in range(num_kills):
        run_until_killed(checkpoints, _chosen(chance, world_size, most_steps), world_size, wait)
        latest, whole = _found(checkpoints)
        acknowledged = _acknowledged(folder)
        told = len(acknowledged)
        newest = max(acknowledged, default=-1)
        lost += latest < newest
        torn += not whole
        unacknowledged += latest > newest
    return SaveKills(num_kills, told, lost, torn, unacknowledged)


def run_until_killed(checkpoints: Path, point: KillPoint, world_size: int, wait: bool) -> None:
    """Let ranks save until one of them is killed; the launcher kills the others.

    Raises:
        RankFailed: if a rank fails otherwise.
    """
    try:
        run(_save_on, world_size, checkpoints, point, wait, timeout=120)
    except RankFailed as error:
        if "SIGKILL" not in str(error):
            raise


def values_of(step: int) -> list[Tensor]:
    """What is saved at a step."""
    return [torch.arange(size, dtype=torch.float32) + 10_000 * step + size for size in SIZES]


def _save_on(checkpoints: Path, point: KillPoint, wait: bool) -> None:
    """On each rank: save step after step, for ever; tell what is durable."""
    comm = Communicator(SharedMemoryTransport())
    taken = [0]
    mine = point if comm.rank == point.rank else KillPoint(comm.rank, None)
    model = _model(0)
    with Checkpointer(checkpoints, comm, keep=1, block_bytes=BLOCK_BYTES,
                      open_disk=lambda: KilledFolder(checkpoints, mine, taken)) as checkpointer:  # fmt: skip
        step = (checkpointer.latest() or 0) + 1
        comm.barrier()  # before anybody saves
        if comm.rank == point.rank and point.disk_step is None:
            threading.Timer(point.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            _set(model, step)
            checkpointer.save({"model": model}, step, wait)
            _set(model, -step)  # a step that goes on: no copy may see it
            checkpointer.wait()
            if comm.rank == 0:
                with (checkpoints.parent / ACKNOWLEDGED).open("ab", buffering=0) as file:
                    file.write(b"%d\n" % step)
            step += 1


def _found(checkpoints: Path) -> tuple[int, bool]:
    """The newest step, -1 if there is none, and whether what it holds is whole."""
    model = _model(0)
    try:
        with Checkpointer(checkpoints) as checkpointer:
            step = checkpointer.load({"model": model}).step
    except NoCheckpoint:
        return -1, True
    except ValueError:
        return -1, False
    return step, all(map(torch.equal, model.buffers(), values_of(step)))


def _acknowledged(folder: Path) -> list[int]:
    path = folder / ACKNOWLEDGED
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def _chosen(chance: random.Random, world_size: int, most_steps: int) -> KillPoint:
    rank = chance.randrange(world_size)
    if chance.random() < 0.25:
        return KillPoint(rank, None, chance.random() * 0.1)
    return KillPoint(rank, chance.randrange(1, most_steps), half=chance.random() < 0.5)


def _model(step: int) -> nn.Module:
    model = nn.Module()
    for number, value in enumerate(values_of(step)):
        model.register_buffer(f"tensor{number}", value)
    return model


def _set(model: nn.Module, step: int) -> None:
    for buffer, value in zip(model.buffers(), values_of(step), strict=True):
        buffer.copy_(value)
