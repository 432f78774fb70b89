"""What each rank keeps of the training state: all of it, slices, all but some experts, or a part of every layer.

The trainer sees one protocol, `Strategy`. Its implementations are `Replica` (an optimizer, and DataParallel between
ranks), `Sharded` (Zero), `ExpertReplica` (data parallelism, with each layer's experts divided among ranks), and
`TensorSharded` (TensorParallel).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.expert_parallel import ExpertParallel
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.parallel.tensor_parallel.strategy import TensorSharded
from minilib.parallel.zero import Zero
from minilib.parallel.zero.sharded import Sharded
from minilib.ranks.collectives import Communicator
from minilib.training.config import TrainConfig

PARALLEL = ("data", "expert", "zero0", "zero1", "zero2", "zero3")  # each rank has its share of a batch
SAME_BATCH = ("tensor", "sequence")  # each rank has a part of every layer, and all of a batch


class Strategy(Protocol):
    """A model's gradients, optimizer and updates. On several ranks every method but `no_sync` is a collective."""

    optimizer: torch.optim.Optimizer  # for its groups' learning rates

    def no_sync(self) -> AbstractContextManager[None]:
        """For all backwards of a step but the last: gradients add up, on each rank where that holds no more memory."""

    def zero_grad(self) -> None:
        """Forget gradients."""

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale gradients, averaged over ranks, down to a global norm; return the norm before."""

    def step(self) -> None:
        """Update parameters, the same on all ranks. Gradients are averaged first, if `clip_grad_norm` has not."""

    def full_state_dict(self) -> dict:
        """On rank 0 the state from which any strategy goes on: {"model": …, "optimizer": …}, as torch has it."""

    def load_full_state_dict(self, state: dict) -> None:
        """Go on from such a state. Its tensors may be mapped from a file, and are copied."""


class Replica:
    """A whole model and its optimizer, on one process or on each rank.

    Args:
        model: its parameters become those of rank 0.
        comm: between the replicas; None on one process.
        optimizer: of the model's parameters.
        skip: parameters that differ from rank to rank.
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
        self._averaged = False

    def no_sync(self) -> AbstractContextManager[None]:
        return self._dp.no_sync() if self._dp is not None else nullcontext()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self._averaged = False

    def clip_grad_norm(self, max_norm: float) -> float:
        self._average()
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()

    def step(self) -> None:
        self._average()
        self.optimizer.step()
        self._averaged = False

    def full_state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_full_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        # AdamW would keep the very tensors, and so the file that they are mapped from.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _average(self) -> None:
        """Average gradients over ranks, once after each step's backwards."""
        if self._dp is not None and (self._dp.due or not self._averaged):
            self._finish()
        self._averaged = True

    def _finish(self) -> None:
        self._dp.finish()


class ExpertReplica(Replica):
    """A replica of all but the experts of a model on each rank, and of every layer's experts a part.

    Args:
        model: whose experts `experts` has cut.
        experts: says which rank has which.
        optimizer: of the model's parameters, as they are after the cut.
    """

    def __init__(self, model: nn.Module, experts: ExpertParallel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, experts.comm, optimizer, skip=experts.parameters)
        self.experts = experts

    def clip_grad_norm(self, max_norm: float) -> float:
        self._average()
        mine = set(self.experts.parameters)
        shared = [p.grad for p in self.model.parameters() if p.grad is not None and p not in mine]
        # A list keeps the order of layers, so that a run's sums are always made in the same one.
        own = (
            nn.utils.get_total_norm([p.grad for p in self.experts.parameters if p.grad is not None])
            .square()
            .double()
            .reshape(1)
        )
        self.experts.comm.all_reduce(own)
        norm = (nn.utils.get_total_norm(shared).square() + own).sqrt().squeeze()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm.item()

    def full_state_dict(self) -> dict:
        """See `Strategy`; all ranks get it."""
        names = {name for name, _ in self.experts.named_parameters(self.model)}
        model = {name: self._whole(x) if name in names else x for name, x in self.model.state_dict().items()}
        return {"model": model, "optimizer": self._moments(self.optimizer.state_dict(), self._whole)}

    def load_full_state_dict(self, state: dict) -> None:
        """See `Strategy`; each rank keeps its experts' part."""
        names = {name for name, _ in self.experts.named_parameters(self.model)}
        own = self.experts.own
        self.model.load_state_dict({name: own(x) if name in names else x for name, x in state["model"].items()})
        self.optimizer.load_state_dict(copy.deepcopy(self._moments(state["optimizer"], own)))

    def _finish(self) -> None:
        super()._finish()
        self.experts.finish()

    def _whole(self, own: Tensor) -> Tensor:
        return self.experts.whole(own.detach())

    def _moments(self, state: dict, change: Callable[[Tensor], Tensor]) -> dict:
        """An optimizer's state with the moments of experts changed."""
        mine = set(self.experts.parameters)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        experts = {number for number, parameter in enumerate(parameters) if parameter in mine}
        changed = {
            number: {key: change(x) if number in experts and x.dim() else x for key, x in moments.items()}
            for number, moments in state["state"].items()
        }
        return {**state, "state": changed}


def choose_strategy(parallel: str, model: nn.Module, comm: Communicator | None, config: TrainConfig) -> Strategy:
    """AdamW in the strategy that `parallel` names; without a communicator, on one process whatever it names.

    With ZeRO and the config's "bf16", parameters and gradients are bfloat16 and the optimizer's masters float32.

    Raises:
        ValueError: if it is neither one of PARALLEL nor of SAME_BATCH.
    """
    if parallel not in PARALLEL + SAME_BATCH:
        raise ValueError(f"parallel is one of {', '.join(PARALLEL + SAME_BATCH)}; got {parallel!r}")
    optimizer = partial(torch.optim.AdamW, lr=config.learning_rate, betas=(0.9, 0.95))
    if comm is not None and parallel == "expert":
        experts = ExpertParallel(model, comm)  # first, since it replaces parameters
        return ExpertReplica(model, experts, optimizer(_groups(model, config.weight_decay)))
    if comm is not None and parallel in SAME_BATCH:
        tp = TensorParallel(model, comm, sequence_parallel=parallel == "sequence")
        return TensorSharded(tp, optimizer(_groups(model, config.weight_decay)))
    groups = _groups(model, config.weight_decay)
    if comm is None or parallel == "data":
        return Replica(model, comm, optimizer(groups))
    stage = int(parallel.removeprefix("zero"))
    zero = Zero(model, comm, stage, optimizer, param_groups=lambda _: groups, precision=config.precision)
    return Sharded(zero, groups)


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms and the embedding table do not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(("embed", "unembed"))]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name.startswith(("embed", "unembed"))]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
