"""Ranks that compute the same gradients, now and then, and compare them before they are averaged.

    check = RecomputeCheck(model.named_parameters(), comm)
    verdict = check.compare(lambda: model.loss(inputs, positions, targets), step)      the same microbatch on all ranks

A gradient that one rank computes wrongly goes into the average, and from there into all replicas alike: they stay
equal, and equally wrong, so `ReplicaCheck` sees nothing. A processor that computes wrongly now and then is found only
by computing something twice, on two of them. Ranks of one kind that hold the same weights compute the same bits, as
long as the model's operations are deterministic.

Source: Gemini Team 2025, "Gemini 2.5", section 2.3: steps that look suspicious are replayed, and checksums compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minilib.operations.integrity.checksums import combined_checksum, content_checksum, told_checksums
from minilib.operations.integrity.verdict import IntegrityVerdict, suspects_of
from minilib.ranks.collectives import Communicator


class RecomputeCheck:
    """Compares the gradients of one microbatch that all ranks of a group compute.

    Args:
        parameters: with names; the same, and the same weights, on all ranks.
        comm: between the ranks of the group. With two, a difference is one of both; with more, a majority names it.

    Raises:
        ValueError: if the group has one rank.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], comm: Communicator) -> None:
        if comm.world_size < 2:
            raise ValueError("one rank alone has nobody to compare with: compute the same on two ranks or more")
        self._parameters, self._comm = dict(parameters), comm

    def compare(self, loss: Callable[[], Tensor], step: int) -> IntegrityVerdict:
        """Whether all ranks compute the same gradients. A collective; leaves `grad` of the parameters as it is.

        Args:
            loss: computes the loss of the microbatch, the same on all ranks.
            step: of the run, for the verdict.

        Cost: a forward and a backward of the microbatch on every rank, of which all but one are beside the training; a
            pass over the gradients; 8 bytes a rank, and as many for each parameter where ranks differ.
        """
        tensors = list(self._parameters.values())
        gradients = torch.autograd.grad(loss(), tensors, allow_unused=True)
        checksums = {
            name: 0 if gradient is None else content_checksum(gradient)
            for name, gradient in zip(self._parameters, gradients, strict=True)
        }
        told = told_checksums([combined_checksum(checksums)], self._comm)
        suspects, named = suspects_of([each[0] for each in told], range(self._comm.world_size))
        if not suspects:
            return IntegrityVerdict(step)
        told = told_checksums(list(checksums.values()), self._comm)
        differing = (name for name, *each in zip(checksums, *told, strict=True) if len(set(each)) > 1)
        return IntegrityVerdict(step, suspects, named, tuple(sorted(differing)))
