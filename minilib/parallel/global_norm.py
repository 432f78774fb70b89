"""Clip gradients by their norm over a whole mesh, each parameter counted once, wherever its parts are.

    clip_global_norm(1.0, [(dense, mesh.comm("pp", "tp")), (own_experts, mesh.comm("pp", "ep", of=experts))])

A parameter is divided among the ranks of some axes, which add up its squares, and replicated along the others, which
add up nothing: the data axis has averaged the gradients before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

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
    total, counted = 0.0, []
    for parameters, comm in parts:
        own = [parameter for parameter in parameters if parameter.grad is not None]
        squares = squared_norm([parameter.grad for parameter in own])
        if comm is not None:
            squares = squares.reshape(1).to(comm.device)
            comm.all_reduce(squares)
        total += squares.item()
        counted += own
    norm = total**0.5
    nn.utils.clip_grads_with_norm_([*counted, *copies], max_norm, torch.tensor(norm, dtype=torch.float64))
    return norm


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Σ g² over all, as a float64 scalar; 0 without any."""
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in gradients]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
