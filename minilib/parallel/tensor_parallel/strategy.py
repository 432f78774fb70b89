"""Tensor parallelism as the trainer uses it: its state is saved as that of one whole model, and loaded on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minilib.parallel.tensor_parallel.tensor_parallel import TensorParallel


class TensorSharded:
    """A `training.strategies.Strategy` over TensorParallel.

    Args:
        tp: has cut the model.
        optimizer: of the model's parameters, as they are after the cut.
    """

    def __init__(self, tp: TensorParallel, optimizer: torch.optim.Optimizer) -> None:
        self.tp, self.optimizer = tp, optimizer
        name = {parameter: name for name, parameter in tp.model.named_parameters()}
        self._names = [name[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        self._summed = False

    def no_sync(self) -> AbstractContextManager[None]:
        """See `Strategy`; gradients of which ranks have parts add up on each, until `finish`."""
        return nullcontext()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self._summed = False

    def clip_grad_norm(self, max_norm: float) -> float:
        self._sum()
        return self.tp.clip_grad_norm(max_norm)

    def step(self) -> None:
        self._sum()
        self.optimizer.step()
        self._summed = False

    def _sum(self) -> None:
        """Once after each step's backwards."""
        if self.tp.due or not self._summed:
            self.tp.finish()
        self._summed = True

    def full_state_dict(self) -> dict:
        """See `Strategy`; all ranks get it."""
        return {
            "model": self.tp.full_state_dict(),
            "optimizer": self._moments(self.optimizer.state_dict(), self.tp.whole),
        }

    def load_full_state_dict(self, state: Mapping) -> None:
        """See `Strategy`; each rank takes its part."""
        self.tp.load_full_state_dict(state["model"])
        self.optimizer.load_state_dict(self._moments(state["optimizer"], self.tp.part))

    def _moments(self, state: Mapping, change: Callable[[str, Tensor], Tensor]) -> dict:
        """An optimizer's state with its values of each element changed; a number, such as AdamW's step, is copied."""
        moments = {
            number: {key: change(self._names[number], x) if x.dim() else x.clone() for key, x in of_parameter.items()}
            for number, of_parameter in state["state"].items()
        }
        return {**state, "state": moments}
