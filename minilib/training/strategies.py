"""Who keeps what while training: one process everything, data-parallel ranks a copy each, ZeRO's ranks a slice each.

The trainer sees one protocol, `Engine`. `Replica` makes DataParallel and an optimizer satisfy it, `Sharded` makes Zero,
and `ExpertReplica` makes data parallelism whose experts are dealt to ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.expert_parallel import ExpertParallel
from minilib.parallel.zero import Zero
from minilib.parallel.zero.sharded import Sharded
from minilib.ranks.collectives import Communicator
from minilib.training.config import TrainConfig

PARALLEL = ("data", "expert", "zero0", "zero1", "zero2", "zero3")


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
        skip: parameters that this rank has of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator | None,
        optimizer: torch.optim.Optimizer,
        skip: Collection[nn.Parameter] = frozenset(),
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._dp = DataParallel(model, comm, skip=skip) if comm is not None else None

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


class ExpertReplica(Replica):
    """A copy of all but the experts of a model on each rank, of them a part.

    Args:
        model: `experts` has cut it already.
        experts: of which rank has which.
        optimizer: of the model's parameters, as they are now.
    """

    def __init__(self, model: nn.Module, experts: ExpertParallel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, experts.comm, optimizer, skip=experts.parameters)
        self._experts = experts

    def clip_grad_norm(self, max_norm: float) -> float:
        self._dp.finish()
        self._experts.finish()
        mine = set(self._experts.parameters)
        shared = [p.grad for p in self.model.parameters() if p.grad is not None and p not in mine]
        # A list keeps the order of layers, so that a run's sums are always made in the same one.
        own = (
            nn.utils.get_total_norm([p.grad for p in self._experts.parameters if p.grad is not None])
            .square()
            .double()
            .reshape(1)
        )
        self._experts.comm.all_reduce(own)
        norm = (nn.utils.get_total_norm(shared).square() + own).sqrt().squeeze()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm.item()

    def full_state_dict(self) -> dict:
        """See `Engine`; all ranks get it."""
        names = {name for name, _ in self._experts.named_parameters(self.model)}
        model = {name: self._whole(x) if name in names else x for name, x in self.model.state_dict().items()}
        return {"model": model, "optimizer": self._moments(self.optimizer.state_dict(), self._whole)}

    def load_full_state_dict(self, state: dict) -> None:
        """See `Engine`; each rank keeps its experts'."""
        names = {name for name, _ in self._experts.named_parameters(self.model)}
        own = self._experts.own
        self.model.load_state_dict({name: own(x) if name in names else x for name, x in state["model"].items()})
        self.optimizer.load_state_dict(self._moments(state["optimizer"], lambda x: own(x).clone()))

    def _whole(self, own: Tensor) -> Tensor:
        return self._experts.whole(own.detach())

    def _moments(self, state: dict, change: Callable[[Tensor], Tensor]) -> dict:
        """An optimizer's state with those of experts changed."""
        mine = set(self._experts.parameters)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        experts = {number for number, parameter in enumerate(parameters) if parameter in mine}
        changed = {
            number: {key: change(x) if number in experts and x.dim() else x for key, x in moments.items()}
            for number, moments in state["state"].items()
        }
        return {**state, "state": changed}


def choose(parallel: str, model: nn.Module, comm: Communicator | None, config: TrainConfig) -> Engine:
    """AdamW in the engine that `parallel` names; without a communicator, one process whatever it names.

    Raises:
        ValueError: if it is not one of PARALLEL.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel is one of {', '.join(PARALLEL)}; got {parallel!r}")
    optimizer = partial(torch.optim.AdamW, lr=config.learning_rate, betas=(0.9, 0.95))
    if comm is not None and parallel == "expert":
        experts = ExpertParallel(model, comm)  # before the optimizer is told what there is
        return ExpertReplica(model, experts, optimizer(_groups(model, config.weight_decay)))
    groups = _groups(model, config.weight_decay)
    if comm is None or parallel == "data":
        return Replica(model, comm, optimizer(groups))
    return Sharded(Zero(model, comm, int(parallel[-1]), optimizer, param_groups=lambda _: groups), groups)


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms and the embedding table do not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(("embed", "unembed"))]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name.startswith(("embed", "unembed"))]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
