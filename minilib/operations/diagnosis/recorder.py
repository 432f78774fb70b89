"""Record a rank's steps, whose phases the trainer tells: times, what the rank computed, and its memory.

On each rank, and then in any process, also if the rank was killed:

    recorder = StepRecorder(folder, comm.rank, model)
    trainer = Trainer(model, …, comm=recorder.metered(comm), phases=recorder)
    trainer.run(after_step=recorder.end_step)
    read_step_records(steps_path(folder, rank))
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from minilib.operations.diagnosis.heartbeat import Heartbeat
from minilib.operations.diagnosis.step_record import PhaseTime, StepRecord
from minilib.operations.metrics.memory_timeline import memory_reader
from minilib.ranks.agreement import checksum
from minilib.ranks.collectives import Communicator, Pending
from minilib.training.trainer import Trainer

PAGE = os.sysconf("SC_PAGE_SIZE")
AVERAGED = ("backward", "gradients")  # phases in which a rank's own gradients leave for the average


class StepRecorder:
    """Records the steps of one rank, a line of JSON each; `StepPhases` for the trainer.

    Args:
        folder: one that is there, of all ranks.
        rank: this one.
        model: whose parameters are checked.
        check_every: steps between two checksums of all parameters; none if 0.
        heartbeat: told where the rank is, if there is one.

    Cost: below 0.1 ms a step; a pass over the gradients, and one at 4 GB/s over the parameters in steps with a check.
    """

    def __init__(
        self, folder: Path, rank: int, model: nn.Module, check_every: int = 10, heartbeat: Heartbeat | None = None
    ) -> None:
        self.rank, self._model, self._check_every, self._heartbeat = rank, model, check_every, heartbeat
        self._opened = ExitStack()
        self._file = _lines_file(steps_path(folder, rank), self._opened)
        self._thread_times, self._memory = _thread_times(self._opened), _memory(self._opened)
        self.step = self._samples = 0
        self._phase, self._phases, self._wait_ns, self._square = "", {}, 0, None
        self._begun_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase of the step; see training/phases.py."""
        wall, (cpu, ready), wait = time.monotonic_ns(), self._thread_times(), self._wait_ns
        self._phase, self._begun_ns = name, self._begun_ns or wall
        if self._heartbeat is not None:
            self._heartbeat.tell(self.step, name)
        try:
            yield
        finally:
            ran, waited_for_core = self._thread_times()
            spent = PhaseTime(time.monotonic_ns() - wall, ran - cpu, waited_for_core - ready, self._wait_ns - wait)
            self._phases[name] = self._phases.get(name, PhaseTime()).plus(spent)
            self._phase = ""

    def metered(self, comm: Communicator) -> MeteredCommunicator:
        """The communicator with which to train, so that waits and own gradients are recorded."""
        return MeteredCommunicator(comm, self)

    def end_step(self, trainer: Trainer) -> None:
        """Write the record of the step that has just ended; the trainer's `after_step`."""
        checked = self._check_every and (self.step + 1) % self._check_every == 0
        record = StepRecord(
            self.rank,
            self.step,
            self._begun_ns,
            time.monotonic_ns(),
            self._phases,
            trainer.samples - self._samples,
            trainer.losses[-1],
            trainer.grad_norms[-1],
            None if self._square is None else self._square**0.5,
            self._memory(),
            {name: checksum(p) for name, p in self._model.named_parameters()} if checked else {},
        )
        os.write(self._file, f"{record.packed()}\n".encode())
        self.step, self._samples = self.step + 1, trainer.samples
        self._phases, self._square, self._begun_ns = {}, None, 0
        if self._heartbeat is not None:
            self._heartbeat.tell(self.step, "between")

    def see_gradients(self, tensor: Tensor, share: int) -> None:
        """Note the norm of gradients that are about to be averaged.

        Args:
            tensor: this rank's gradients, divided by `share`.
        """
        if self._phase in AVERAGED and tensor.is_floating_point():
            norm = torch.linalg.vector_norm(tensor.detach()).item() * share
            self._square = (self._square or 0.0) + norm * norm

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The thread that steps waits for other ranks; time in which it waits for a core is not counted twice."""
        begun, (_, ready) = time.monotonic_ns(), self._thread_times()
        try:
            yield
        finally:
            self._wait_ns += max(0, time.monotonic_ns() - begun - (self._thread_times()[1] - ready))


class MeteredCommunicator:
    """A communicator whose waits and gradients a `StepRecorder` sees.

    Args:
        comm: makes the calls; all its methods and attributes are there.
        recorder: of this rank.
    """

    COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all", "barrier")

    def __init__(self, comm: Communicator, recorder: StepRecorder) -> None:
        self._comm, self._recorder = comm, recorder

    def __getattr__(self, name: str) -> object:
        found = getattr(self._comm, name)
        return partial(self._call, found) if name in self.COLLECTIVES else found

    def _call(self, collective: Callable, *args, **options) -> object:
        if args and isinstance(args[0], Tensor):
            self._recorder.see_gradients(args[0], self._comm.world_size)
        with self._recorder.waiting():
            result = collective(*args, **options)
        return MeteredPending(result, self._recorder) if isinstance(result, Pending) else result


class MeteredPending(Pending):
    """A collective on its way; `wait` is recorded."""

    def __init__(self, pending: Pending, recorder: StepRecorder) -> None:
        self._pending, self._recorder = pending, recorder

    def wait(self) -> None:
        """See `Pending.wait`."""
        with self._recorder.waiting():
            self._pending.wait()

    @property
    def done(self) -> bool:
        """See `Pending.done`."""
        return self._pending.done

    def on_done(self, call: Callable[[BaseException | None], object]) -> None:
        """See `Pending.on_done`."""
        self._pending.on_done(call)


def steps_path(folder: Path, rank: int) -> Path:
    """The file of a rank's step records."""
    return folder / f"{rank}.steps"


def _lines_file(path: Path, opened: ExitStack) -> int:
    """A file to append lines to, without one that a killed process has left half written."""
    file = _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, opened)
    content = path.read_bytes()
    os.ftruncate(file, content.rfind(b"\n") + 1)
    return file


def _thread_times(opened: ExitStack) -> Callable[[], tuple[int, int]]:
    """What reads, for the thread that calls this now, ns that it ran and ns that it waited for a core.

    Where there is no Linux to tell the latter, it is 0.
    """
    with suppress(OSError):
        file = _opened("/proc/thread-self/schedstat", os.O_RDONLY, opened)
        return lambda: tuple(map(int, os.pread(file, 64, 0).split()[:2]))
    return lambda: (time.thread_time_ns(), 0)


def _memory(opened: ExitStack) -> Callable[[], int]:
    """What reads the bytes of memory that this process holds."""
    with suppress(OSError):
        file = _opened("/proc/self/statm", os.O_RDONLY, opened)
        return lambda: int(os.pread(file, 128, 0).split()[1]) * PAGE
    return lambda: memory_reader()()["resident"]


def _opened(path: Path | str, flags: int, opened: ExitStack) -> int:
    file = os.open(path, flags)
    opened.callback(os.close, file)
    return file
