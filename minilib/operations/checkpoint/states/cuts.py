"""The states of the library's kinds of parallelism: which box of each parameter a rank has.

    data, context      everything; the ranks share the writing           replica_state
    ZeRO               a slice of every row                              ZeroState
    tensor             columns or rows of every matrix                   tensor_parallel_state
    expert             everything, but a part of the experts             expert_parallel_state
    pipeline           the parameters of some layers                     pipeline_state

Along the other axes of a mesh ranks hold the same, so the communicator of a checkpoint is one of all ranks, and nothing
has to be said of the mesh.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.table import Fragment, HeldBox, StateMismatch, StoredTensor
from minilib.operations.checkpoint.states.model_state import ModelState, Saveable, persistent_buffers, whole_fragment
from minilib.operations.checkpoint.states.shares import held_by
from minilib.operations.checkpoint.states.zero_state import ZeroState
from minilib.parallel.expert_parallel import ExpertParallel
from minilib.parallel.pipeline.pipeline_parallel import PipelineParallel
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.parallel.tensor_parallel.strategy import TensorSharded
from minilib.parallel.zero.sharded import Sharded
from minilib.training.strategies import ExpertReplica, Replica, Strategy
from minilib.training.trainer import Trainer


def replica_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ModelState:
    """A whole model on each rank, or on one process."""
    return ModelState(model.named_parameters(), persistent_buffers(model), optimizer)


def tensor_parallel_state(tp: TensorParallel, optimizer: torch.optim.Optimizer | None = None) -> ModelState:
    """A model of which each rank has a part of every layer; padding is not saved."""

    def cut(name: str, part: Tensor) -> list[Fragment]:
        dim, shape = tp.cuts[name].dim, list(part.shape)
        shape[dim] = sum(group.size for group in tp.cuts[name].groups)
        found, before = [], 0
        for group, mine in zip(tp.cuts[name].groups, tp.cuts[name].split(part), strict=True):
            columns = group.ranges[tp.comm.rank]
            first, stop = min(columns.start, group.size), min(columns.stop, group.size)
            start, extent = [0] * len(shape), list(part.shape)
            start[dim], extent[dim] = before + first, stop - first
            box = Box(tuple(start), tuple(extent))
            found.append(Fragment(name, tuple(shape), box, mine.narrow(dim, 0, stop - first)))
            before += group.size
        return found

    return ModelState(tp.model.named_parameters(), persistent_buffers(tp.model), optimizer, cut)


def expert_parallel_state(
    model: nn.Module, experts: ExpertParallel, optimizer: torch.optim.Optimizer | None = None
) -> ModelState:
    """A model of which each rank has all but the experts, and a part of those."""
    of_experts = {name for name, _ in experts.named_parameters(model)}

    def cut(name: str, own: Tensor) -> list[Fragment]:
        if name not in of_experts:
            return whole_fragment(name, own)
        shape = (len(own) * experts.comm.world_size, *own.shape[1:])
        start = (len(own) * experts.comm.rank, *(0 for _ in own.shape[1:]))
        return [Fragment(name, shape, Box(start, tuple(own.shape)), own)]

    return ModelState(model.named_parameters(), persistent_buffers(model), optimizer, cut)


def pipeline_state(pipeline: PipelineParallel, optimizer: torch.optim.Optimizer | None = None) -> ModelState:
    """A model of which each rank has the layers of its stages."""
    buffers = {name: x for stage in pipeline.stages.values() for name, x in persistent_buffers(stage)}
    return ModelState(pipeline.named_parameters(), buffers.items(), optimizer)


def strategy_state(strategy: Strategy) -> Saveable:
    """The state of one of the trainer's strategies.

    Raises:
        TypeError: for another one.
    """
    match strategy:
        case Sharded(zero=zero):
            return ZeroState(zero)
        case TensorSharded(tp=tp, optimizer=optimizer):
            return tensor_parallel_state(tp, optimizer)
        case ExpertReplica(model=model, experts=experts, optimizer=optimizer):
            return expert_parallel_state(model, experts, optimizer)
        case Replica(model=model, optimizer=optimizer):
            return replica_state(model, optimizer)
    raise TypeError(f"a {type(strategy).__name__} is none of the strategies whose parts are known")


class TrainerState:
    """All of a training run: weights, optimizer, biases of experts, step, losses; the sampler follows from the step.

    Args:
        trainer: loaded into one of the same config, model and data, with any strategy.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._state = trainer, strategy_state(trainer.strategy)

    def fragments(self) -> list[Fragment]:
        """See `Saveable`."""
        return self._state.fragments()

    def values(self) -> dict:
        """The optimizer's options and the run's progress."""
        return {"strategy": self._state.values(), "progress": self._trainer.progress()}

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        """See `Saveable`.

        Raises:
            CannotResume: if it was another run.
        """
        self._trainer.check_same_run(values["progress"])
        return self._state.prepare(stored, values["strategy"])

    def accept(self, values: Mapping) -> None:
        """Go on where the run stood."""
        self._trainer.go_on_from(values["progress"])
        self._state.accept(values["strategy"])


class JsonState:
    """Something whose state is values alone, such as a sampler.

    Args:
        holder: with state_dict and load_state_dict.
    """

    def __init__(self, holder: object) -> None:
        self._holder = holder

    def fragments(self) -> list[Fragment]:
        """None."""
        return []

    def values(self) -> dict:
        """What the holder says."""
        return self._holder.state_dict()

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        """Nothing to prepare."""
        return set()

    def accept(self, values: Mapping) -> None:
        """Give it back to the holder."""
        self._holder.load_state_dict(values)


def saveables(state: Mapping[str, object]) -> dict[str, Saveable]:
    """`saveable` for each part of a state."""
    return {name: saveable(name, each) for name, each in state.items()}


def prepared_to_save(state: Mapping[str, object]) -> tuple[list[Fragment], list[HeldBox], dict]:
    """Fragments of a state's tensors, what of them this rank holds, and its values.

    Values are copies: the run goes on, and appends to lists that are not written yet. Fragments are not.

    Raises:
        StateMismatch: see `held_by`.
    """
    states = saveables(state)
    fragments = [fragment for each in states.values() for fragment in each.fragments()]
    return fragments, held_by(fragments), copy.deepcopy({name: each.values() for name, each in states.items()})


def saveable(name: str, state: object) -> Saveable:
    """A state as it is, a model, or something with state_dict and load_state_dict that JSON can say.

    Raises:
        StateMismatch: if it is none of these.
    """
    if hasattr(state, "fragments"):
        return state
    if isinstance(state, Trainer):
        return TrainerState(state)
    if isinstance(state, nn.Module):
        return replica_state(state)
    if (
        hasattr(state, "state_dict")
        and hasattr(state, "load_state_dict")
        and not isinstance(state, torch.optim.Optimizer)
    ):
        return JsonState(state)
    raise StateMismatch(f"{name} is a {type(state).__name__}, which has no state that is known; an optimizer is saved "
                        "with its model: replica_state(model, optimizer)")  # fmt: skip
