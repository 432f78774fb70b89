"""An all-to-all of rows in forward, and of their gradients the other way in backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minilib.ranks.collectives import Communicator


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], comm: Communicator) -> Tensor:
    """Send each rank its part of the rows, and receive this rank's parts of theirs. Differentiable; a collective.

    Args:
        rows: (Σ sent, width), those for rank 0 first.
        sent: rows for each rank.
        received: rows from each rank.
        comm: between the ranks.

    Returns:
        (Σ received, width), those from rank 0 first.

    Cost: one all-to-all in forward, and one as large in backward.
    """
    return _AllToAll.apply(rows, list(sent), list(received), comm)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], comm: Communicator) -> Tensor:
        ctx.sent, ctx.received, ctx.comm = sent, received, comm
        return _exchange(rows, sent, received, comm)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.comm), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], comm: Communicator) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    comm.all_to_all(list(out.split(received)), list(rows.contiguous().split(sent)))
    return out
