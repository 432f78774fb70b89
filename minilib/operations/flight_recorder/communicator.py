"""A communicator whose collectives are recorded: when each is called, begins and ends, and where it was called.

recorder = Recorder(f"/dev/shm/{job}/rank{rank}", rank)
comm = RecordedCommunicator(Communicator(GroupTransport()), recorder)
DataParallel(model, comm)           and so for Zero, TensorParallel, Trainer
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minilib.mechanisms.replication import Plan
from minilib.operations.flight_recorder.recorder import ASYNCHRONOUS, ENDED, REFUSED, STARTED, WAITED, Recorder
from minilib.ranks.collectives import Communicator, MessageTraffic, Pending, Result, chunk_of
from minilib.ranks.torch_communicator import TorchCommunicator, TorchPending
from minilib.ranks.transport.base import Transport

# Operation, reduction, root and dtype of a call, on which ranks must agree.
Kind = tuple[str, str | None, int | None, object]
BARRIER: Kind = ("barrier", None, None, "")
MESSAGE: Kind = ("message", None, None, "")


class GroupCalls:
    """The calls of one group that are on their way: they are made one after the other, so the first one has begun."""

    def __init__(self, recorder: Recorder, group: int) -> None:
        self._recorder, self._group, self._next = recorder, group, 0
        self._kinds: dict[tuple, int] = {}
        self._under_way: deque[int] = deque()
        self._lock = recorder.lock

    def begin(self, kind: Kind, shape: tuple[int, ...], asynchronous: bool, now: int) -> int:
        """Record a call of the line that called the caller's caller, and return its number."""
        name = self._kinds.get(kind)
        if name is None:
            parts = ("" if part is None else str(part).removeprefix("torch.") for part in kind)
            name = self._kinds[kind] = self._recorder.name("|".join(parts))
        site = self._recorder.site(3)
        with self._lock:
            sequence = -1
            if kind is not MESSAGE:
                sequence, self._next = self._next, self._next + 1
            flags, first = ASYNCHRONOUS if asynchronous else 0, not self._under_way
            number = self._recorder.begin(self._group, name, site, flags, sequence, shape, first, now)
            self._under_way.append(number)
        return number

    def end(self, number: int, mark: int) -> None:
        """Record the end of a call, once, and the beginning of the one behind it.

        Args:
            number: what `begin` returned.
            mark: the time; negative if the call failed, REFUSED if it was none.
        """
        with self._lock:
            if number not in self._under_way:
                return
            first = self._under_way[0] == number
            self._under_way.remove(number)
            self._recorder.mark(number, ENDED, mark)
            if mark == REFUSED:  # nothing was sent, so the next call has its number
                self._next -= 1
                self._recorder.entered(self._group, self._next)
            elif first and self._under_way:
                self._recorder.mark(self._under_way[0], STARTED, abs(mark))

    def ended_here(self, number: int, began: int, failed: bool = False) -> None:
        """Record that a call is over for which the caller has waited since `began`."""
        now = time.monotonic_ns()
        self.end(number, -now if failed else now)
        self._recorder.waited_ns += now - began

    def waits(self, number: int, waited: int, since: int) -> None:
        """Record that the caller waits for a call, and how long it has waited before."""
        with self._lock:
            self._recorder.mark(number, WAITED, waited - since)

    def waited(self, number: int, waited: int, since: int) -> int:
        """Record that the caller waits no more, and return how long it has waited in all."""
        now = time.monotonic_ns()
        with self._lock:
            self._recorder.mark(number, WAITED, waited + now - since)
            self._recorder.waited_ns += now - since
        return waited + now - since


class RecordedPending:
    """A recorded collective in the background; `wait` for it before touching its tensor."""

    def __init__(self, pending: Pending | TorchPending, calls: GroupCalls, number: int) -> None:
        self._pending, self._calls, self._number, self._waited = pending, calls, number, 0

    def wait(self) -> None:
        """Return when it is done, or raise what it raised."""
        began = time.monotonic_ns()
        self._calls.waits(self._number, self._waited, began)
        try:
            self._pending.wait()
            if self._pending.done:  # else a stream waits, and nobody else
                self._calls.end(self._number, time.monotonic_ns())
        except BaseException:
            self._calls.end(self._number, -time.monotonic_ns())
            raise
        finally:
            self._waited = self._calls.waited(self._number, self._waited, began)

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._pending.done


class RecordedCommunicator:
    """Takes the calls of a communicator, passes them on, and records them.

    Calls of a communicator in the background are recorded from its thread. A TorchCommunicator tells nobody when one is
    done: there the next call or `wait` finds out, so that an end can be recorded late, never early.

    Args:
        comm: belongs to this one from now on.
        recorder: of this rank; communicators of several groups share it.
        group: name, such as "dp"; equal on all ranks of the group.
        ranks: of the job, in the order of the group; 0 … world_size - 1 if left out.

    Attributes:
        rank, world_size, device: those of `comm`.
    """

    def __init__(
        self,
        comm: Communicator | TorchCommunicator,
        recorder: Recorder,
        group: str = "world",
        ranks: Sequence[int] | None = None,
    ) -> None:
        ranks = tuple(range(comm.world_size)) if ranks is None else tuple(ranks)
        if len(ranks) != comm.world_size or ranks[comm.rank] != recorder.rank:
            raise ValueError(
                f"rank {comm.rank} of {comm.world_size} in group {group!r} is rank {recorder.rank} of the job, "
                f"which does not agree with ranks={ranks}"
            )
        self._comm, self._calls = comm, GroupCalls(recorder, recorder.group(group, ranks))
        self.rank, self.world_size, self.device = comm.rank, comm.world_size, comm.device
        self._on_gpu = self.device.type != "cpu"  # there a call returns before it is done
        self._unseen: deque[tuple[int, TorchPending]] = deque()  # whose end nobody has told yet

    @property
    def traffic(self) -> MessageTraffic:
        """See `Communicator`."""
        return self._comm.traffic

    @property
    def transport(self) -> Transport:
        """See `Communicator`."""
        return self._comm.transport

    def empty(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Communicator.empty`."""
        return self._comm.empty(numel, dtype)

    def all_reduce(
        self, tensor: Tensor, op: str = "sum", plan: Plan | None = None, async_op: bool = False
    ) -> RecordedPending | None:
        """See `Communicator.all_reduce`; so do the others."""
        call = partial(self._comm.all_reduce, tensor, op, plan)
        return self._recorded(("all_reduce", op, None, tensor.dtype), tensor.shape, call, async_op)

    def reduce_scatter(self, tensor: Tensor, op: str = "sum", async_op: bool = False) -> Tensor | RecordedPending:
        call = partial(self._comm.reduce_scatter, tensor, op)
        pending = self._recorded(("reduce_scatter", op, None, tensor.dtype), tensor.shape, call, async_op)
        return pending or chunk_of(tensor, self.rank, self.world_size)

    def all_gather(self, tensor: Tensor, async_op: bool = False) -> RecordedPending | None:
        call = partial(self._comm.all_gather, tensor)
        return self._recorded(("all_gather", None, None, tensor.dtype), tensor.shape, call, async_op)

    def broadcast(
        self, tensor: Tensor, src: int = 0, plan: Plan | None = None, async_op: bool = False
    ) -> RecordedPending | None:
        call = partial(self._comm.broadcast, tensor, src, plan)
        return self._recorded(("broadcast", None, src, tensor.dtype), tensor.shape, call, async_op)

    def reduce(
        self, tensor: Tensor, dst: int = 0, op: str = "sum", plan: Plan | None = None, async_op: bool = False
    ) -> RecordedPending | None:
        call = partial(self._comm.reduce, tensor, dst, op, plan)
        return self._recorded(("reduce", op, dst, tensor.dtype), tensor.shape, call, async_op)

    def all_to_all(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], async_op: bool = False
    ) -> RecordedPending | None:
        shape = sum(x.numel() for x in outputs), sum(x.numel() for x in inputs)
        call = partial(self._comm.all_to_all, outputs, inputs)
        return self._recorded(("all_to_all", None, None, inputs[0].dtype), shape, call, async_op)

    def barrier(self) -> None:
        self._recorded(BARRIER, (), lambda async_op: self._comm.barrier(), False)

    def guarded(self, run: Callable[[], Result], what: str) -> Result:
        """See `Communicator.guarded`; a message between two ranks is none of the group's numbered calls."""
        began = time.monotonic_ns()
        number, failed = self._calls.begin(MESSAGE, (), False, began), True
        try:
            result = self._comm.guarded(run, what)
            failed = False
        finally:
            self._calls.ended_here(number, began, failed)
        return result

    def close(self) -> None:
        self._comm.close()

    def _recorded(
        self, kind: Kind, shape: tuple[int, ...], call: Callable[..., object], async_op: bool
    ) -> RecordedPending | None:
        """Make the call `call(async_op=…)`, and record it."""
        if self._unseen:
            self._look()
        calls, on_gpu = self._calls, self._on_gpu and kind is not BARRIER
        began = time.monotonic_ns()
        number = calls.begin(kind, shape, async_op, began)
        try:
            pending = call(async_op=async_op or on_gpu)
            if on_gpu and not async_op:
                pending.wait()
        except (ValueError, TypeError):
            calls.end(number, REFUSED)
            raise
        except BaseException:
            calls.ended_here(number, began, failed=True)
            raise
        if not async_op and not on_gpu:
            calls.ended_here(number, began)
            return None
        if isinstance(pending, Pending):
            pending.on_done(lambda error: calls.end(number, time.monotonic_ns() * (-1 if error else 1)))
        else:
            self._unseen.append((number, pending))
        return RecordedPending(pending, calls, number) if async_op else None

    def _look(self) -> None:
        """Record the ends of calls that are done by now."""
        while self._unseen and self._unseen[0][1].done:
            self._calls.end(self._unseen.popleft()[0], time.monotonic_ns())
