"""Collectives by plan: all-reduce, reduce-scatter, all-gather, broadcast, reduce and all-to-all on tensors.

    comm = Communicator(GroupTransport())            over the process group's send and receive
    comm = Communicator(SharedMemoryTransport())     between ranks of one host
    comm.all_reduce(gradient)                        the same bits on every rank afterwards

Whatever the plan, a rank walks through its rounds, sends what the plan says and adds or takes over what comes.
In production: NCCL, gloo, MPI; `torch.distributed` in front of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from minilib.mechanisms.replication import Plan, Transfer, plans
from minilib.ranks.combine import COMBINE, check_contiguous, check_tensor
from minilib.ranks.pieces import Pieces, buffer_for, chunks_of, content_of, exchange_pieces
from minilib.ranks.rank_steps import steps_of
from minilib.ranks.transport.base import CollectiveFailed, CollectiveMismatch, Combine, Message, Transport

# Up to here few messages matter more than few bytes. A tree sends 2(n-1) of them in all, halving and doubling n·log n:
# with 4 ranks on two cores, 64 KiB took 0.6 to 2.8 ms by the tree and 0.9 to 8.6 ms by the others (chapter 04).
SMALL_BYTES = 2**16
Result = TypeVar("Result")
GRACE = 0.5  # seconds before a rank reports that another one failed, who is to be the first to say so


@dataclass
class MessageTraffic:
    """What a rank has sent.

    Args:
        messages: how many, labels not counted.
        bytes: of content.
    """

    messages: int = 0
    bytes: int = 0


class Pending:
    """A collective that goes on in the background; `wait` for it before touching its tensor."""

    def __init__(self, future: Future) -> None:
        self._future = future

    def wait(self) -> None:
        """Return when it is done, or raise what it raised."""
        self._future.result()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._future.done()

    def on_done(self, call: Callable[[BaseException | None], object]) -> None:
        """Call `call` with what was raised, or None, when it is done: in the thread that made the collective."""
        self._future.add_done_callback(lambda future: call(future.exception()))


class Communicator:
    """The collectives of one group of ranks; all ranks make the same calls in the same order.

    After a failure it stays broken: what other ranks did is not known.

    Args:
        transport: how messages travel; it belongs to the communicator from now on.

    Attributes:
        device: where tensors have to be. For GPUs there is `TorchCommunicator`.
    """

    device = torch.device("cpu")

    def __init__(self, transport: Transport) -> None:
        self.transport, self.traffic = transport, MessageTraffic()
        self.rank, self.world_size = transport.rank, transport.world_size
        self._calls, self._broken, self._closed = 0, "", False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collectives")
        self._last: Future | None = None

    def empty(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Transport.empty`."""
        return self.transport.empty(numel, dtype)

    def all_reduce(
        self, tensor: Tensor, op: str = "sum", plan: Plan | None = None, async_op: bool = False
    ) -> Pending | None:
        """Combine `tensor` over all ranks, in place; the same bits everywhere.

        Args:
            tensor: of any shape, equal on all ranks.
            op: one of COMBINE; "avg" divides the sum by the number of ranks.
            plan: an all-reduce; a tree up to SMALL_BYTES and a ring for larger tensors if left out.
            async_op: return at once, and go on in the background.

        Raises:
            ValueError: if an argument is not one of those, before anything is sent; so do all collectives.
            CollectiveMismatch: if another rank is in another call; so do all collectives.
            CollectiveFailed: if another rank is lost, failed or does not come in time, or an earlier call failed.

        Cost: that of the plan; a ring sends 2·(n-1)/n of the tensor's bytes.
        """
        if plan is None:
            small = tensor.numel() * tensor.element_size() <= SMALL_BYTES
            plan = (_tree if small else ring_plan)("all_reduce", self.world_size)
        return self._start(plan, "all_reduce", tensor, op, async_op)

    def reduce_scatter(self, tensor: Tensor, op: str = "sum", async_op: bool = False) -> Tensor | Pending:
        """Combine over all ranks, in place: each rank gets its own of `world_size` chunks, the others are undefined.

        Args:
            tensor: contiguous.

        Returns:
            This rank's chunk, a view of `tensor`, flat (see `chunk_of`); a Pending with async_op.

        Cost: a ring; (n-1)/n of the tensor's bytes sent.
        """
        own = chunk_of(tensor, self.rank, self.world_size)
        pending = self._start(ring_plan("reduce_scatter", self.world_size), "reduce_scatter", tensor, op, async_op)
        return pending or own

    def all_gather(self, tensor: Tensor, async_op: bool = False) -> Pending | None:
        """Complete `tensor`, of which each rank has its own chunk (see `chunk_of`), in place.

        Cost: a ring; (n-1)/n of the tensor's bytes sent.
        """
        return self._start(ring_plan("all_gather", self.world_size), "all_gather", tensor, None, async_op)

    def broadcast(
        self, tensor: Tensor, src: int = 0, plan: Plan | None = None, async_op: bool = False
    ) -> Pending | None:
        """Everybody gets the tensor of rank `src` of the group, in place; by a binary tree if no plan is given."""
        plan = self._rooted(plan, "broadcast", src)
        return self._start(plan, "broadcast", tensor, None, async_op)

    def reduce(
        self, tensor: Tensor, dst: int = 0, op: str = "sum", plan: Plan | None = None, async_op: bool = False
    ) -> Pending | None:
        """Rank `dst` gets the combination, in place; elsewhere the tensor is undefined. By a tree if without a plan."""
        plan = self._rooted(plan, "reduce", dst)
        return self._start(plan, "reduce", tensor, op, async_op)

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], async_op: bool = False) -> Pending | None:
        """Rank r gets inputs[r] of every rank; outputs[s] is what came from rank s.

        Args:
            outputs, inputs: one contiguous tensor a rank; sizes may differ, also be 0, but outputs[s] here is as large
                as inputs[here] on rank s.
        """
        n = self.world_size
        if len(inputs) != n or len(outputs) != n:
            raise ValueError(f"all_to_all takes {n} inputs and outputs, got {len(inputs)} and {len(outputs)}")
        for tensor in (*inputs, *outputs):
            check_tensor(tensor, None)
            check_contiguous(tensor)
        dtypes = {str(tensor.dtype) for tensor in (*inputs, *outputs)}
        if len(dtypes) > 1:
            raise ValueError(f"all_to_all takes tensors of one dtype, got {', '.join(sorted(dtypes))}")
        sent, received = ([tensor.detach().view(-1) for tensor in tensors] for tensors in (inputs, outputs))
        if len(sent[self.rank]) != len(received[self.rank]):
            raise ValueError(f"rank {self.rank} sends itself {len(sent[self.rank])} values, and expects "
                             f"{len(received[self.rank])}")  # fmt: skip

        def pieces(t: Transfer) -> Sequence[Tensor]:
            return [sent[t.dst] if t.src == self.rank else received[t.src]]

        def run(label: str) -> None:
            received[self.rank].copy_(sent[self.rank])
            self._walk(_all_to_all(n), pieces, None, label)

        return self._submit(run, f"all_to_all {inputs[0].dtype}", async_op)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.all_reduce(torch.zeros(1, dtype=torch.uint8))

    def guarded(self, run: Callable[[], Result], what: str) -> Result:
        """Use the transport for something that is no collective, in this thread, when no collective is on its way.

        Args:
            run: whatever it raises breaks the communicator, so that ranks that wait for this one hear of it.
            what: its name in errors.

        Raises:
            CollectiveFailed: if the communicator is closed, or an earlier call failed.
        """
        if self._closed:
            raise CollectiveFailed(f"rank {self.rank} calls {what} on a communicator that is closed")
        return self._guarded(lambda label: run(), what)

    def close(self) -> None:
        """Finish what is on its way, and close the transport."""
        self._closed = True
        self._thread.shutdown()
        self.transport.close()

    def _rooted(self, plan: Plan | None, collective: str, root: int) -> Plan:
        """The plan, or a tree if there is none; from or to `root`."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"there is no rank {root!r}; ranks are 0 … {self.world_size - 1}")
        if plan is not None and plan.root != root:
            raise ValueError(f"{collective} of rank {root} cannot follow a plan of rank {plan.root}")
        return plan or _tree(collective, self.world_size, root)

    def _start(self, plan: Plan, collective: str, tensor: Tensor, op: str | None, async_op: bool) -> Pending | None:
        """Check the call and walk through its plan, now or in the background."""
        check_tensor(tensor, op)
        if (plan.collective, plan.world_size) != (collective, self.world_size):
            wanted, found = f"{collective} of {self.world_size} ranks", f"{plan.collective} of {plan.world_size}"
            raise ValueError(f"{wanted} cannot follow a plan for {found}")
        combine = COMBINE[op] if op else None

        def run(label: str) -> None:
            flat = tensor.detach().contiguous().view(-1)
            self._walk(plan, chunks_of(flat, plan.num_chunks), combine, label)
            if op == "avg":
                (torch.view_as_real(flat) if flat.is_complex() else flat).div_(self.world_size)
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))

        what = f"{collective} {op}" if op else collective
        what += f" {plan.name}/{plan.num_chunks} {tensor.dtype} {tuple(tensor.shape)}"
        return self._submit(run, what, async_op)

    def _submit(self, run: Callable[[str], None], what: str, async_op: bool) -> Pending | None:
        """Number the call, and run it after those before it."""
        if self._closed:
            raise CollectiveFailed(f"rank {self.rank} calls {what} on a communicator that is closed")
        self._calls += 1
        label = f"call {self._calls}, {what}"
        if async_op or (self._last is not None and not self._last.done()):
            self._last = self._thread.submit(self._guarded, run, label)
            if async_op:
                return Pending(self._last)
            return self._last.result()
        return self._guarded(run, label)

    def _guarded(self, run: Callable[[str], Result], label: str) -> Result:
        if self._broken:
            raise CollectiveFailed(f"rank {self.rank} in {label}: {self._broken}")
        try:
            return run(label)
        except BaseException as error:
            if self._broken:  # by a call within this one
                raise
            why = f"{str(error) or type(error).__name__} (in {label})"
            self._broken = f"an earlier call failed: {why}"
            self.transport.close()  # so that whoever waits for this rank hears of it
            if isinstance(error, CollectiveFailed):
                if not isinstance(error, CollectiveMismatch):
                    time.sleep(GRACE)
                raise type(error)(why) from error
            raise

    def _walk(self, plan: Plan, pieces: Pieces, combine: Combine | None, label: str) -> None:
        """This rank's part of every round; two ranks compare labels with the first message that passes between them."""
        spoken: set[tuple[str, int]] = set()

        def message(side: str, peer: int, content: Tensor) -> Message | None:
            if not content.numel():  # nobody waits for a message of no bytes
                return None
            new = (side, peer) not in spoken
            spoken.add((side, peer))
            return Message(peer, content, label if new else None)

        for step in steps_of(plan, self.rank):
            send = receive = None
            places: Sequence[Tensor] = ()
            if step.out:
                send = message("to", step.out.dst, content_of(pieces(step.out), step.keep))
            if step.into:
                places = pieces(step.into)
                receive = message("from", step.into.src, buffer_for(places))
            if send:
                self.traffic.messages += 1
                self.traffic.bytes += send.content.nbytes
            exchange_pieces(self.transport, send, receive, places, combine if step.into and step.into.reduce else None)


def chunk_of(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """The part of a contiguous tensor, flat, that a rank owns: sizes differ by at most 1, the larger ones first."""
    check_contiguous(tensor)
    return tensor.detach().view(-1).tensor_split(world_size)[rank]


ring_plan = lru_cache(plans.ring)
_tree = lru_cache(plans.tree)
_all_to_all = lru_cache(plans.all_to_all)
