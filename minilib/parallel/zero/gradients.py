"""The gradients of one row of ZeRO: all of them on their way, and this rank's slice of their average.

    stage    full                                      own
    0        always; reduced in place                  all of it
    1        always; reduced in place                  this rank's slice of it
    2, 3     a bucket, from backward to its reduction  a tensor, the slice

A parameter's .grad is added to the full gradient, and dropped, as soon as autograd has made it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.parallel.zero.layout import UnsuitableModel
from minilib.parallel.zero.row import Row
from minilib.ranks.collectives import Communicator, Pending, ring_plan


class LateGradient(RuntimeError):
    """A gradient came after its unit's were sent off; the message says whose."""


class Buckets:
    """Buffers through which gradients go to their owners: one fills while another is on its way.

    Args:
        comm: allocates the buffers, so that it can send from them without a copy.
        numel, dtype: of each.
        count: how many.
    """

    def __init__(self, comm: Communicator, numel: int, dtype: torch.dtype, count: int) -> None:
        self._all = {bucket.data_ptr(): bucket for bucket in (comm.empty(numel, dtype) for _ in range(count))}
        self._free = list(self._all.values())
        self._sent: dict[Gradients, None] = {}  # in the order in which they began
        self._dtype, self._device = dtype, comm.device

    def lease(self, numel: int) -> Tensor:
        """A buffer with undefined content; a new one if all are in use, as when gradients accumulate."""
        while not self._free and self._sent:
            next(iter(self._sent)).settle()
        return self._free.pop()[:numel] if self._free else torch.empty(numel, dtype=self._dtype, device=self._device)

    def sent(self, holder: Gradients) -> None:
        """Remember whose buffer is on its way."""
        self._sent[holder] = None

    def give_back(self, holder: Gradients, buffer: Tensor) -> None:
        """It is free again."""
        self._sent.pop(holder, None)
        if buffer.data_ptr() in self._all:
            self._free.append(self._all[buffer.data_ptr()])

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return list(self._all.values())


class Gradients:
    """Of one row on one rank.

    Args:
        row: whose.
        comm: between the ranks that share it.
        buckets: where the full gradient lives in stages 2 and 3.
    """

    def __init__(self, row: Row, comm: Communicator, buckets: Buckets) -> None:
        self.row, self._comm, self._buckets = row, comm, buckets
        self._cut, self._everything = row.stage >= 2, frozenset(range(len(row.parameters)))
        length, dtype = row.layout.length, row.dtypes.gradients
        self.full = None if self._cut else comm.empty(length, dtype)
        self.own = torch.empty_like(row.own, dtype=dtype) if self._cut else self.full[row.owned]
        self.arrived: set[int] = set()  # whose gradients are in `full`
        self.missing: set[int] = set()  # whose have yet to come in this backward
        self.reduced = False  # whether `own` is an average over ranks
        self._pending: Pending | None = None

    @property
    def slice(self) -> Tensor:
        """This rank's slice of the average, in stage 0 as well, where every rank owns all of it."""
        return self.own if self._cut else self.full[self.row.slice]

    def expect(self) -> None:
        """A backward begins."""
        self.missing = set(self._everything)

    def take(self, index: int) -> None:
        """Add a parameter's new .grad, divided by the number of ranks, to the full gradient, and drop it."""
        parameter, layout = self.row.parameters[index], self.row.layout
        if index not in self.missing:
            raise LateGradient(
                f"{layout.names[index]} got a gradient after those of unit {layout.name!r} were sent off: use it in no "
                "forward but its block's, or name other blocks; checkpoint activations with use_reentrant=False"
            )
        gradient = parameter.grad.detach()
        if gradient.layout != torch.strided:
            raise UnsuitableModel(
                f"{layout.names[index]} has a gradient of layout {gradient.layout}, and rows are dense: "
                "build the embedding with sparse=False"
            )
        into = self._open()[slice(*layout.spans[index])].view(gradient.shape)
        if index in self.arrived:
            into.add_(gradient, alpha=1 / self._comm.world_size)
        else:
            torch.mul(gradient, 1 / self._comm.world_size, out=into)
        parameter.grad = None
        self.arrived.add(index)
        self.missing.discard(index)

    def reduce(self) -> None:
        """Begin to add the full gradients of all ranks up; what has not arrived counts as zero. A collective."""
        full, layout = self._open(), self.row.layout
        self.missing.clear()
        for index in self._everything - self.arrived:
            full[slice(*layout.spans[index])].zero_()
        full[layout.numel :].zero_()
        if self.row.stage == 0:  # a ring at any size: all stages add in one order, and so get the same bits
            plan = ring_plan("all_reduce", self._comm.world_size)
            self._pending = self._comm.all_reduce(full, plan=plan, async_op=True)
        else:
            self._pending = self._comm.reduce_scatter(full, async_op=True)
        if self._cut:
            self._buckets.sent(self)

    def settle(self) -> None:
        """Wait for a reduction that is on its way, if one is, and keep the own slice."""
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        if self._cut:
            combine = self.own.add_ if self.reduced else self.own.copy_
            combine(self.full[self.row.slice])
            self._drop()
        self.arrived.clear()
        self.reduced = True

    def zero(self) -> None:
        """Forget all gradients."""
        self.settle()
        self.arrived.clear()
        self.reduced = False
        if self._cut:
            self._drop()

    def check_invariants(self) -> None:
        """After `zero`, or between a step and the next backward."""
        assert self._pending is None and not self.arrived, "gradients are on their way, or not reduced"
        assert (self.full is None) == self._cut, "a bucket is held, or a full gradient is missing"
        assert all(parameter.grad is None for parameter in self.row.parameters), "a gradient was left behind"

    def _open(self) -> Tensor:
        """The full gradient, such that whatever arrives can be added to it."""
        self.settle()
        if self.full is None:
            self.full = self._buckets.lease(self.row.layout.length)
        elif not self._cut and self.reduced and not self.arrived:
            # What is reduced stays with its owner alone, or the next reduction would count it once for every rank.
            self.full[: self.row.slice.start].zero_()
            self.full[self.row.slice.stop :].zero_()
            self.arrived = set(self._everything)
        return self.full

    def _drop(self) -> None:
        if self.full is not None:
            self._buckets.give_back(self, self.full)
            self.full = None
