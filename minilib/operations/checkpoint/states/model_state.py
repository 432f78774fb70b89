"""What is saved of a run, as fragments of global tensors: a model and its optimizer, whoever has which part of them.

    model.NAME                      every parameter and every buffer that a state_dict has; with ZeRO the optimizer's
                                    masters; a tied parameter once
    optimizer.state.NAME.KEY        AdamW's exp_avg, exp_avg_sq and step of each parameter

The names are those of torch.distributed.checkpoint. A cut says which box of a parameter a rank has; moments are cut as
their parameter is. So a checkpoint does not say how the model was cut, and may be loaded where it is cut otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch, StoredTensor

MODEL, OPTIMIZER = "model.", "optimizer.state."
Cut = Callable[[str, Tensor], list[Fragment]]  # a parameter's name and this rank's memory of it → the boxes in it


class Saveable(Protocol):
    """A part of a run's state: tensors, and values that JSON can say."""

    def fragments(self) -> list[Fragment]:
        """This rank's memory of every tensor; loading writes into it."""

    def values(self) -> dict:
        """What else there is to save; rank 0's is saved."""

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        """Before anything is loaded: make room for what a checkpoint holds, and refuse what does not fit.

        Returns:
            Names of tensors that are left out knowingly.

        Raises:
            ValueError: if the checkpoint is of another run.
        """

    def accept(self, values: Mapping) -> None:
        """Tensors were loaded: take over the values too. A collective if the state's own are."""


class ModelState:
    """A model and its optimizer.

    Args:
        parameters: names in the whole model, and this rank's parameters, each once.
        buffers: the same, of what every rank has.
        optimizer: of the parameters; None to save a model alone.
        cut: of the parameters; every rank has all of them if left out.

    Raises:
        StateMismatch: if the optimizer has a parameter without a name.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        buffers: Iterable[tuple[str, Tensor]] = (),
        optimizer: torch.optim.Optimizer | None = None,
        cut: Cut | None = None,
    ) -> None:
        self._parameters, self._buffers = dict(parameters), dict(buffers)
        self._optimizer, self._cut = optimizer, cut or whole_fragment
        self._name = {parameter: name for name, parameter in self._parameters.items()}
        groups = optimizer.param_groups if optimizer is not None else []
        if any(parameter not in self._name for group in groups for parameter in group["params"]):
            raise StateMismatch("the optimizer has a parameter that the model has not: make both from one model")

    def fragments(self) -> list[Fragment]:
        """See `Saveable`."""
        found = [_named(MODEL, piece) for name, p in self._parameters.items() for piece in self._cut(name, p.detach())]
        found += [_named(MODEL, piece) for name, b in self._buffers.items() for piece in whole_fragment(name, b)]
        for name, state in self._states():
            parameter = self._parameters[name]
            for key, value in tensors_of(name, state):
                cut = self._cut if value.shape == parameter.shape and value.dim() else whole_fragment
                found += [_moment(key, piece) for piece in cut(name, value)]
        return found

    def values(self) -> dict:
        """The options of the optimizer's groups, and which parameters are in each on this rank."""
        if self._optimizer is None:
            return {}
        return {"param_groups": [group_options(group) for group in self._optimizer.param_groups]}

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        """Give each parameter the moments that are stored, zeros at first, and no others."""
        if self._optimizer is None:
            return set()
        kept = keys_by_name(stored)
        for name, parameter in self._parameters.items():
            if self._trains(parameter):
                state = self._optimizer.state[parameter]
                shape = self._cut(name, parameter.detach())[0].shape
                make_room(
                    state, parameter, shape, {key: stored[f"{OPTIMIZER}{name}.{key}"] for key in kept.get(name, ())}
                )
        return set()

    def accept(self, values: Mapping) -> None:
        """Set the options of the optimizer's groups."""
        if self._optimizer is not None:
            set_options(self._optimizer, values["param_groups"])

    def _states(self) -> Iterator[tuple[str, Mapping]]:
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield self._name[parameter], self._optimizer.state.get(parameter, {})

    def _trains(self, parameter: nn.Parameter) -> bool:
        return any(parameter is mine for group in self._optimizer.param_groups for mine in group["params"])


def whole_fragment(name: str, tensor: Tensor) -> list[Fragment]:
    """A tensor that this rank has all of."""
    shape = tuple(tensor.shape)
    return [Fragment(name, shape, Box.whole(shape), tensor)]


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What a model's state_dict has beside parameters."""
    parameters = set(model.parameters())
    return [(name, x) for name, x in model.state_dict(keep_vars=True).items() if x not in parameters]


def keys_by_name(stored: Iterable[str]) -> dict[str, list[str]]:
    """Keys of each parameter's optimizer state, from the names of a checkpoint's tensors."""
    found: dict[str, list[str]] = {}
    for full in stored:
        if full.startswith(OPTIMIZER):
            name, _, key = full.removeprefix(OPTIMIZER).rpartition(".")
            found.setdefault(name, []).append(key)
    return found


def make_room(state: dict, like: Tensor, shape: Sequence[int], wanted: Mapping[str, StoredTensor]) -> None:
    """Give an optimizer's state of one parameter the keys that are wanted, and no others.

    Args:
        state: key → tensor; what is there already is kept.
        like: this rank's memory of the parameter.
        shape: of the whole parameter.
        wanted: key → as it is stored; one of another shape than the parameter, such as a step, is whole on each rank.
    """
    for key in [key for key, value in state.items() if isinstance(value, Tensor) and key not in wanted]:
        del state[key]
    for key, tensor in wanted.items():
        per_element = tensor.shape == tuple(shape) and tensor.shape
        if key not in state:
            room = torch.zeros_like(like, dtype=tensor.dtype) if per_element else None
            state[key] = torch.zeros(tensor.shape, dtype=tensor.dtype) if room is None else room.detach()


def tensors_of(name: str, state: Mapping) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state of one parameter.

    Raises:
        StateMismatch: for a value that is neither a tensor nor None.
    """
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, value.detach()
        elif value is not None:
            raise StateMismatch(f"the optimizer keeps {key} of {name} as {value!r}, and tensors alone are saved")


def group_options(group: Mapping) -> dict:
    """The options of an optimizer's group, as JSON has them."""
    options = {key: value for key, value in group.items() if key != "params"}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in options.items()}


def set_options(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping]) -> None:
    """Give an optimizer's groups the options that were saved.

    Raises:
        StateMismatch: if there are other groups.
    """
    if len(saved) != len(optimizer.param_groups):
        raise StateMismatch(f"the checkpoint has {len(saved)} groups of parameters, here are "
                            f"{len(optimizer.param_groups)}")  # fmt: skip
    for number, (group, options) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        mine = group.keys() - {"params"}
        if mine != options.keys():
            raise StateMismatch(f"group {number} of the optimizer has the options {sorted(mine)}, and in the "
                                f"checkpoint {sorted(options)}: it is another optimizer")  # fmt: skip
        for key, value in options.items():
            _set_option(group, key, value)


def _set_option(group: dict, key: str, value: object) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(group[key], tuple) else value


def _named(prefix: str, fragment: Fragment) -> Fragment:
    return fragment._replace(name=prefix + fragment.name)


def _moment(key: str, fragment: Fragment) -> Fragment:
    return fragment._replace(name=f"{OPTIMIZER}{fragment.name}.{key}")
