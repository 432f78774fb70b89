"""Inject a fault into a training job, where such a fault would come from: a phase of the step, a link, or the disk."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from minilib.mechanisms.journaling import WriteFile
from minilib.numbers.machine import Link
from minilib.operations.checkpoint.format.folder import CheckpointFolder
from minilib.operations.drills.training.fault import InjectedFault
from minilib.operations.integrity.flips import flip_bit
from minilib.ranks.collectives import Communicator
from minilib.training.phases import PHASES, StepPhases
from minilib.training.trainer import Trainer

NO_DELAY = Link(float("inf"))


class Injector:
    """One rank's part of a fault: nothing, on most ranks.

    Args:
        fault: None for a healthy run.
        rank: this one.
    """

    def __init__(self, fault: InjectedFault | None, rank: int) -> None:
        self._fault, self._mine = fault, fault is not None and rank == fault.rank
        self._step, self._hoard = -1, []
        self._phases: StepPhases | None = None
        self._trainer: Trainer | None = None

    def around(self, phases: StepPhases) -> StepPhases:
        """The same phases, amid which the fault comes."""
        self._phases = phases
        return self._phase

    def attach(self, trainer: Trainer) -> None:
        """Say which trainer the fault befalls."""
        self._trainer = trainer

    def link(self, src: int, dst: int) -> Link:
        """What the link between two ranks is now, for a `ShapedTransport`."""
        fault = self._fault
        slow = fault and fault.kind == "slow_link" and (src, dst) == fault.link and self._step >= fault.step
        return Link(float("inf"), fault.size / 1e3) if slow else NO_DELAY

    def disk(self, folder: Path) -> CheckpointFolder:
        """The folder of checkpoints, on a disk that may be full."""
        full = self._mine and self._fault.kind == "full_disk"
        return FullFolder(folder, int(self._fault.size * 1024)) if full else CheckpointFolder(folder)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._step += name == PHASES[0]
        with self._phases(name):
            if self._mine and self._fault.kind in STRIKES:
                where, lasting, strike = STRIKES[self._fault.kind]
                here = name == (where or PHASES[int(self._fault.size)])
                if here and (self._step >= self._fault.step if lasting else self._step == self._fault.step):
                    strike(self._fault, self._trainer, self._hoard)
            yield


class FullFolder(CheckpointFolder):
    """A folder on a disk that takes so many bytes and no more."""

    def __init__(self, folder: Path, free: int) -> None:
        super().__init__(folder)
        self._free = free

    def run(self, steps):
        for step in steps:
            if isinstance(step, WriteFile):
                self._free -= len(step.data)
                if self._free < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            super().run([step])


def _compute(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    until = time.thread_time() + fault.size / 1e3
    while time.thread_time() < until:
        pass


def _starve(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    time.sleep(fault.size / 1e3)


def _hang(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    while True:
        time.sleep(1)


def _mismatch(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    comm: Communicator = trainer.comm
    if fault.size:
        comm.barrier()
    else:
        comm.broadcast(torch.zeros(1, dtype=torch.float64))


def _misshape(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    trainer.comm.all_reduce(torch.zeros(int(fault.size), dtype=torch.float64), "avg")


def _desynchronise(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] *= fault.size


def _poison(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    parameters = list(trainer.model.parameters())
    parameter = parameters[int(fault.size) % len(parameters)]

    def to_nan(gradient: torch.Tensor) -> torch.Tensor:
        hook.remove()
        return torch.full_like(gradient, torch.nan)

    hook = parameter.register_hook(to_nan)


def _flip(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    parameters = [p for p in trainer.model.parameters() if p.dim() > 1]
    flip_bit(parameters[fault.step % len(parameters)], 32 * 7 * fault.step + int(fault.size))


def _leak(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    hoard.append(torch.ones(int(fault.size * 2**20), dtype=torch.uint8))


def _lose(fault: InjectedFault, trainer: Trainer, hoard: list) -> None:
    os.kill(os.getpid(), signal.SIGSTOP if fault.size else signal.SIGKILL)


Strike = Callable[[InjectedFault, Trainer, list], None]
# kind → phase (None: the one that the size numbers), whether in every step from then on, and what happens
STRIKES: Mapping[str, tuple[str | None, bool, Strike]] = {
    "slow_rank": ("forward", True, _compute),
    "hung_rank": (None, False, _hang),
    "mismatched_collective": ("loss", False, _mismatch),
    "wrong_shape": ("loss", False, _misshape),
    "desynchronised_replica": ("optimizer", False, _desynchronise),
    "nan_from_one_rank": ("forward", False, _poison),
    "flipped_bit": ("data", False, _flip),
    "memory_leak": ("data", True, _leak),
    "starved_loader": ("data", True, _starve),
    "lost_heartbeat": ("forward", False, _lose),
}
