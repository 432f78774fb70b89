"""The same collectives by torch.distributed's own: NCCL for CUDA tensors, gloo for CPU tensors.

    comm = TorchCommunicator()        in ranks that launch.run(…, backend="nccl") started
    DataParallel(model, comm)         and so for Zero and ExpertParallel: they ask a communicator for nothing else

`Communicator` shows how collectives work and what each plan costs; this one brings GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from minilib.mechanisms.replication import Plan
from minilib.ranks.collectives import chunk_of
from minilib.ranks.combine import check_contiguous
from minilib.ranks.transport.base import CollectiveFailed

OPS = {op: getattr(dist.ReduceOp, op.upper()) for op in ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")}


class TorchPending:
    """Collectives on their way; on a GPU, `wait` makes the current stream wait and returns at once.

    Args:
        works: of torch.distributed.
        finish: what is left to do on this rank when they are done.
    """

    def __init__(self, works: Sequence[dist.Work], finish: Callable[[], object] = lambda: None) -> None:
        self._works, self._finish = works, finish

    def wait(self) -> None:
        """Return when they are done, or raise CollectiveFailed."""
        for work in self._works:
            _named(work.wait)
        finish, self._finish = self._finish, lambda: None
        finish()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work.is_completed() for work in self._works)


class TorchCommunicator:
    """Takes the calls of `Communicator`, and makes them over a process group.

    Plans are not followed: torch.distributed chooses its own. Tensors are contiguous.

    Args:
        group: process group; the default one if left out. It stays the caller's.

    Attributes:
        device: where tensors have to be: the current GPU for NCCL, else the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def empty(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor to send from, (numel,), with undefined content."""
        return torch.empty(numel, dtype=dtype, device=self.device)

    def all_reduce(
        self, tensor: Tensor, op: str = "sum", plan: Plan | None = None, async_op: bool = False
    ) -> TorchPending | None:
        """See `Communicator.all_reduce`."""
        call = partial(dist.all_reduce, self._flat(tensor), OPS[op], self._group, async_op=True)
        return self._run([call], async_op)

    def reduce_scatter(self, tensor: Tensor, op: str = "sum", async_op: bool = False) -> Tensor | TorchPending:
        """See `Communicator.reduce_scatter`; where chunks differ in size, one reduction for each."""
        flat, own = self._flat(tensor), chunk_of(tensor, self.rank, self.world_size)
        if flat.numel() % self.world_size == 0 and self.device.type == "cuda":  # gloo would read what it has written
            calls = [partial(dist.reduce_scatter_tensor, own, flat, OPS[op], self._group, async_op=True)]
        else:
            parts = flat.tensor_split(self.world_size)
            calls = [self._reduce(part, rank, op) for rank, part in enumerate(parts)]
        return self._run(calls, async_op) or own

    def all_gather(self, tensor: Tensor, async_op: bool = False) -> TorchPending | None:
        """See `Communicator.all_gather`; where chunks differ in size, one broadcast for each."""
        flat, own = self._flat(tensor), chunk_of(tensor, self.rank, self.world_size)
        if flat.numel() % self.world_size == 0 and self.device.type == "cuda":
            calls = [partial(dist.all_gather_into_tensor, flat, own, self._group, async_op=True)]
        else:
            parts = flat.tensor_split(self.world_size)
            calls = [self._broadcast(part, rank) for rank, part in enumerate(parts)]
        return self._run(calls, async_op)

    def broadcast(
        self, tensor: Tensor, src: int = 0, plan: Plan | None = None, async_op: bool = False
    ) -> TorchPending | None:
        """See `Communicator.broadcast`."""
        return self._run([self._broadcast(self._flat(tensor), src)], async_op)

    def reduce(
        self, tensor: Tensor, dst: int = 0, op: str = "sum", plan: Plan | None = None, async_op: bool = False
    ) -> TorchPending | None:
        """See `Communicator.reduce`."""
        return self._run([self._reduce(self._flat(tensor), dst, op)], async_op)

    def all_to_all(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], async_op: bool = False
    ) -> TorchPending | None:
        """See `Communicator.all_to_all`."""
        received, sent = [self._flat(x) for x in outputs], [self._flat(x) for x in inputs]
        into, sizes = [list(map(len, parts)) for parts in (received, sent)]
        arrived, leaving = torch.cat(received), torch.cat(sent)  # gloo takes uneven parts of one tensor only

        def finish() -> None:
            for place, part in zip(received, arrived.split(into), strict=True):
                place.copy_(part)

        call = partial(dist.all_to_all_single, arrived, leaving, into, sizes, self._group, async_op=True)
        return self._run([call], async_op, finish)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        _named(lambda: dist.barrier(self._group))

    def close(self) -> None:
        """Nothing to give back: the group is the caller's."""

    def _flat(self, tensor: Tensor) -> Tensor:
        if tensor.device != self.device:
            backend = dist.get_backend(self._group)
            raise ValueError(f"a group of {backend} carries tensors on {self.device}, got one on {tensor.device}")
        check_contiguous(tensor)
        return tensor.detach().view(-1)

    def _reduce(self, part: Tensor, dst: int, op: str) -> Callable[[], dist.Work]:
        return partial(dist.reduce, part, op=OPS[op], group=self._group, async_op=True, group_dst=dst)

    def _broadcast(self, part: Tensor, src: int) -> Callable[[], dist.Work]:
        return partial(dist.broadcast, part, group=self._group, async_op=True, group_src=src)

    def _run(
        self, calls: Sequence[Callable[[], dist.Work]], async_op: bool, finish: Callable[[], object] = lambda: None
    ) -> TorchPending | None:
        pending = TorchPending([_named(call) for call in calls], finish)
        return pending if async_op else pending.wait()


def _named(call: Callable[[], object]):
    """What a call returns, or CollectiveFailed for torch.distributed's RuntimeError."""
    try:
        return call()
    except RuntimeError as error:
        raise CollectiveFailed(str(error).splitlines()[0]) from error
