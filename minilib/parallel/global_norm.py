"""Clip gradients by their norm over a whole mesh, each parameter counted once, wherever its parts are.

    clip_global_norm(1.0, [(dense, mesh.comm("pp", "tp")), (own_experts, mesh.comm("pp", "ep", of=experts))])

A parameter is divided among the ranks of some axes, which add up its squares, and replicated along the others, which
add up nothing: the data axis has averaged the gradients before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from minilib.ranks.collectives import Communicator

Part = tuple[Iterable[nn.Parameter], Communicator | None]  # parameters, and the ranks that have a part of them each


def clip_global_norm(max_norm: float, parts: Sequence[Part], copies: Iterable[nn.Parameter] = ()) -> float:
    """Scale gradients down to a global norm; a collective, the same result on every rank.

    Args:
        max_norm: largest norm of all gradients together.
        parts: parameters with the communicator of the ranks that share them out, each rank another part; None where
            every rank has them whole. Parameters without a gradient are left out.
        copies: scaled, too, but counted elsewhere, such as the tied table of a pipeline's last stage.

    Returns:
        The norm before.
    """
    total, gradients = 0.0, []
    for parameters, comm in parts:
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients += own
        squares = sum((grad.detach().double().square().sum() for grad in own), torch.zeros((), dtype=torch.float64))
        if comm is not None:
            squares = squares.reshape(1).to(comm.device)
            comm.all_reduce(squares)
        total += squares.item()
    norm = total**0.5
    scale = min(max_norm / (norm + 1e-6), 1.0)  # in this order a norm that is NaN makes the scale NaN, as torch does
    for grad in (*gradients, *(parameter.grad for parameter in copies if parameter.grad is not None)):
        grad.mul_(scale)
    return norm
