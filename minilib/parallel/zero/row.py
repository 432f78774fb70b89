"""One row of ZeRO: some parameters end to end, whole where they are used, and the slice of it that this rank owns.

    stage    the row                       own                       masters, if of another dtype
    0        always whole                  all of it                 of all of it
    1, 2     always whole                  this rank's slice of it   of the slice
    3        from `gather` to `release`    a tensor, the slice       of the slice

The optimizer takes the masters, or what is owned where there are none, for its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilib.parallel.zero.layout import FROZEN, Layout
from minilib.parallel.zero.ledger import Precision
from minilib.ranks.collectives import Communicator, Pending


class Part(NamedTuple):
    """What the optimizer takes for a parameter: the masters of one of its groups in this rank's slice of a row.

    Args:
        group: its number.
        span: where in the owned slice.
        values: (elements,) a view of the masters.
    """

    group: int
    span: slice
    values: Tensor


class Row:
    """The parameters of one row on one rank.

    Args:
        layout: where they lie in it.
        parameters: in that order; from now on their values are views of the row. Ranks start with rank 0's.
        comm: between the ranks that share it.
        stage: of ZeRO.
        dtypes: of what it holds.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        comm: Communicator,
        stage: int,
        dtypes: Precision,
    ) -> None:
        self.layout, self.parameters, self.stage, self.dtypes = layout, parameters, stage, dtypes
        self.trained = FROZEN not in layout.groups
        self.slice = slice(*layout.slices[comm.rank])
        self.owned = slice(0, layout.length) if stage == 0 else self.slice
        self._comm = comm
        self._coming: Pending | None = None
        if stage in (1, 2):  # the stages that send from it, after every step
            self.full = comm.empty(layout.length, dtypes.parameters)
        else:
            self.full = torch.empty(layout.length, dtype=dtypes.parameters, device=comm.device)
        self.own = self.full.new_empty(layout.length // comm.world_size) if stage == 3 else self.full[self.owned]
        self.master = torch.empty_like(self.own, dtype=dtypes.masters) if self.trained and dtypes.mixed else self.own
        self.parts = self._parts() if self.trained else []
        self.gathered = True
        self.fill([parameter.detach() for parameter in parameters])
        self._show()
        if stage == 3:
            self.release()

    @torch.no_grad()
    def fill(self, values: Sequence[Tensor] | None) -> None:
        """Take over rank 0's values, of each parameter in order; other ranks may pass None. A collective."""
        whole = torch.zeros(self.layout.length, dtype=self.dtypes.masters, device=self._comm.device)
        if values is not None:
            for (start, stop), value in zip(self.layout.spans, values, strict=True):
                whole[start:stop].copy_(value.reshape(-1))
        self._comm.broadcast(whole)
        self.master.copy_(whole[self.owned])
        if self.stage == 3:
            self.own.copy_(self.master)
        else:
            self.full.copy_(whole)

    def values(self) -> list[Tensor]:
        """Copies of all parameters as the optimizer has them. A collective in stages 1 to 3."""
        whole = torch.empty(self.layout.length, dtype=self.dtypes.masters, device=self._comm.device)
        whole[self.owned].copy_(self.master)
        if self.stage > 0:
            self._comm.all_gather(whole)
        return [part.clone() for part in self._views(whole)]

    def publish(self) -> None:
        """Bring updated masters to where parameters are used; `ready` waits for it. A collective in stages 1 and 2."""
        if self.master is not self.own:
            self.own.copy_(self.master)
        if self.stage in (1, 2):
            self._coming = self._comm.all_gather(self.full, async_op=True)

    def gather(self) -> None:
        """Begin to fill the row from its owners, unless it is whole; `ready` waits for it. A collective."""
        if not self.gathered:
            self.full.untyped_storage().resize_(self.layout.length * self.full.element_size())
            self.full[self.slice].copy_(self.own)
            self._coming = self._comm.all_gather(self.full, async_op=True)
            self.gathered = True

    def ready(self) -> None:
        """Wait until the parameters may be used."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None
            if self.stage == 3:
                self._show()

    def release(self) -> None:
        """In stage 3, let go of all but the own slice.

        Storage shrinks and grows in place, so that what autograd saved of it is valid again after the next `gather`.
        """
        if self.gathered:
            self.ready()
            nothing = self.full.new_empty(0)  # using it is an error of shapes, and no crash
            for parameter in self.parameters:
                parameter.data = nothing
            self.full.untyped_storage().resize_(0)
            self.gathered = False

    def check_invariants(self) -> None:
        """Between steps."""
        assert self._coming is None, "parameters are on their way"
        assert self.gathered == (self.stage < 3), "a row of stage 3 is whole, or one of another stage is not"
        size = self.layout.length * self.full.element_size() if self.gathered else 0
        assert self.full.untyped_storage().nbytes() == max(size, self.gathered), "storage of another size"
        assert torch.equal(self.own, self.master.to(self.own.dtype)), "the optimizer's parameters are not those in use"
        if self.gathered:
            for parameter, part in zip(self.parameters, self._views(self.full), strict=True):
                assert parameter.data_ptr() == part.data_ptr(), "a parameter is no view of the row"
                assert parameter.shape == part.shape, "a parameter has another shape"
        else:
            assert not any(parameter.numel() for parameter in self.parameters), "a parameter outlives its row"

    def _show(self) -> None:
        for parameter, part in zip(self.parameters, self._views(self.full), strict=True):
            parameter.data = part

    def _views(self, whole: Tensor) -> list[Tensor]:
        """Each parameter's part of a row, in its shape."""
        spans = zip(self.layout.spans, self.layout.shapes, strict=True)
        return [whole[start:stop].view(shape) for (start, stop), shape in spans]

    def _parts(self) -> list[Part]:
        """One for each group, empty if the owned slice has nothing of it, so that all ranks' optimizers look alike."""
        parts, (first, last) = [], (self.owned.start, self.owned.stop)
        for group in dict.fromkeys(self.layout.groups):
            start, stop = (min(max(place, first), last) - first for place in self.layout.group_span(group))
            parts.append(Part(group, slice(start, stop), self.master[start:stop]))
        return parts
