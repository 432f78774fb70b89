"""Who keeps what while training: one process everything, data-parallel ranks a copy each, ZeRO's ranks a slice each.

The trainer sees one protocol, `Engine`. `Replica` makes DataParallel and an optimizer satisfy it, `Sharded` makes Zero.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import nn

from minilib.training.collectives import Communicator
from minilib.training.data_parallel import DataParallel
from minilib.training.sharded import Sharded
from minilib.training.train_config import TrainConfig
from minilib.training.zero import Zero

PARALLEL = ("data", "zero0", "zero1", "zero2", "zero3")


class Engine(Protocol):
    """A model's training state between a backward and the next. On several ranks every method is a collective."""

    optimizer: torch.optim.Optimizer  # for its groups' learning rates

    def zero_grad(self) -> None:
        """Forget gradients."""

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale gradients, averaged over ranks, down to a global norm; returns the norm that they had."""

    def step(self) -> None:
        """Update the parameters, alike on all ranks."""

    def full_state_dict(self) -> dict:
        """On rank 0 all that going on needs, in any engine: {"model": …, "optimizer": …} as torch has them."""

    def load_full_state_dict(self, state: dict) -> None:
        """Go on from such a state."""


class Replica:
    """A whole model and its optimizer: the only one, or one of as many as there are ranks.

    Args:
        model: its parameters become those of rank 0.
        comm: between the replicas; None if there is but one.
        optimizer: of the model's parameters.
    """

    def __init__(self, model: nn.Module, comm: Communicator | None, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._dp = DataParallel(model, comm) if comm is not None else None

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def clip_grad_norm(self, max_norm: float) -> float:
        if self._dp is not None:
            self._dp.finish()
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()

    def step(self) -> None:
        self.optimizer.step()

    def full_state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_full_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def choose(parallel: str, model: nn.Module, comm: Communicator | None, config: TrainConfig) -> Engine:
    """AdamW in the engine that `parallel` names; without a communicator, one process whatever it names.

    Raises:
        ValueError: if it is not one of PARALLEL.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel is one of {', '.join(PARALLEL)}; got {parallel!r}")
    optimizer = partial(torch.optim.AdamW, lr=config.learning_rate, betas=(0.9, 0.95))
    groups = _groups(model, config.weight_decay)
    if comm is None or parallel == "data":
        return Replica(model, comm, optimizer(groups))
    return Sharded(Zero(model, comm, int(parallel[-1]), optimizer, param_groups=lambda _: groups), groups)


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms and the embedding table do not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(("embed", "unembed"))]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name.startswith(("embed", "unembed"))]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
