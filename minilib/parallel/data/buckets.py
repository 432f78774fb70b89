"""Gradients in flat pieces of memory, so that many travel as one message: which share a piece, how they get there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from minilib.mechanisms.basics.arithmetic import round_up
from minilib.ranks.collectives import Communicator, Pending

CACHE_LINE = 64  # bytes


class Bucket:
    """Gradients that travel together.

    Args:
        parameters: of one dtype.
        flat: (their values,) contiguous, for their gradients one after another.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        self.parameters, self.flat = tuple(parameters), flat
        parts = flat.split([parameter.numel() for parameter in parameters])
        self.gradients = [_shaped_like(p, part) for p, part in zip(parameters, parts, strict=True)]
        self.reset()

    def reset(self) -> None:
        """Nothing is here yet."""
        self.missing = set(range(len(self.parameters)))
        self.pending: Pending | None = None

    def collect(self, index: int, scale: float) -> None:
        """Put a parameter's gradient, scaled, into its part; from then on that part is its .grad."""
        parameter, part = self.parameters[index], self.gradients[index]
        if parameter.grad is None:
            part.zero_()
        elif parameter.grad is part:
            part.mul_(scale)
        else:
            torch.mul(parameter.grad.detach(), scale, out=part)
        parameter.grad = part
        self.missing.discard(index)


def cut(parameters: Sequence[nn.Parameter], limit: float) -> list[list[nn.Parameter]]:
    """Neighbours of one dtype to a bucket, until it has `limit` bytes; buckets in the order in which they fill."""
    full: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        bucket = filling.setdefault(parameter.dtype, [])
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= limit:
            full.append(filling.pop(parameter.dtype))
    return full + list(filling.values())


def allocate(groups: Sequence[Sequence[nn.Parameter]], comm: Communicator) -> list[Bucket]:
    """Buckets in one piece of memory that the communicator sends from, each beginning where a cache line does."""
    sizes = [sum(p.nbytes for p in parameters) for parameters in groups]
    starts = [0, *accumulate(round_up(size, CACHE_LINE) for size in sizes)]
    memory = comm.empty(starts[-1], torch.uint8)
    parts = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return [Bucket(parameters, part.view(parameters[0].dtype)) for parameters, part in zip(groups, parts, strict=True)]


def _shaped_like(parameter: Tensor, part: Tensor) -> Tensor:
    """A flat part seen in a parameter's shape and memory layout, which fused optimizers rely on."""
    return part.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())
