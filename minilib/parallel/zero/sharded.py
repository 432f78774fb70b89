"""ZeRO as the trainer uses it: its state is saved as that of one whole model, and loaded on any number of ranks.

    on ranks    row "layers.0": │ rank 0 ······ │ rank 1 ······ │ padding      values and moments, end to end
    saved       layers.0.qkv.weight, its exp_avg, its exp_avg_sq, …            as model.state_dict() and AdamW have them

A model that fits on no single host saves `Zero.state_dict` of each rank instead.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minilib.parallel.zero.zero import Zero
from minilib.ranks.agreement import gather_numbers
from minilib.ranks.collectives import Communicator


class Sharded:
    """A `training.strategies.Strategy` over Zero.

    Args:
        zero: made with the same groups.
        groups: of the model's parameters, in the optimizer's order.
    """

    def __init__(self, zero: Zero, groups: Iterable[Mapping]) -> None:
        name = {parameter: name for name, parameter in zero.model.named_parameters()}
        self.zero, self.optimizer = zero, zero.optimizer
        self._names = [[name[parameter] for parameter in group["params"]] for group in groups]
        self._order = [name for names in self._names for name in names]
        self.zero_grad, self.clip_grad_norm, self.step = zero.zero_grad, zero.clip_grad_norm, zero.step

    def no_sync(self) -> AbstractContextManager[None]:
        """See `Strategy`; stages 2 and 3 reduce every backward, since they hold slices of gradients only."""
        return self.zero.no_sync() if self.zero.stage < 2 else nullcontext()

    def full_state_dict(self) -> dict:
        """See `Strategy`; ranks other than 0 get an empty dict.

        Cost: rank 0 holds the whole state, and for a time a second copy.
        """
        model = self.zero.full_state_dict(rank=0)
        own = self.zero.state_dict()
        states = [own] if own["num_slices"] == 1 else _gather(own, self.zero.comm)
        if self.zero.comm.rank > 0:
            return {}
        moments = _by_name(states)
        state = {number: moments[name] for number, name in enumerate(self._order) if moments[name]}
        numbers = iter(range(len(self._order)))
        groups = [
            {**options, "params": [next(numbers) for _ in names]}
            for options, names in zip(own["param_groups"], self._names, strict=True)
        ]
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}}

    def load_full_state_dict(self, state: Mapping) -> None:
        """See `Strategy`; a rank reads the slices of the state that it will own."""
        saved = state["optimizer"]
        moments = {name: saved["state"].get(number, {}) for number, name in enumerate(self._order)}
        options = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
        for name, buffer in self.zero.model.named_buffers():
            if name in state["model"]:  # the others follow from the config
                buffer.copy_(state["model"][name])
        self.zero.load_by_name(state["model"], moments, options)


def _by_name(states: Sequence[Mapping]) -> dict[str, dict]:
    """Each parameter's part of the optimizer's state, from the states of all ranks in order."""
    moments: dict[str, dict] = {}
    for unit, row in states[0]["rows"].items():
        shape = dict(zip(row["names"], map(torch.Size, row["shapes"]), strict=True))
        for group in row["optimizer"]:
            names = _names(row, group)
            shapes = [shape[name] for name in names]
            moments |= {name: {} for name in names}
            slices = [state["rows"][unit]["optimizer"][group] for state in states]
            for key in slices[0]:
                for name, part in zip(names, _parts([each[key] for each in slices], shapes), strict=True):
                    moments[name][key] = part
    return moments


def _parts(slices: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The slices of all ranks, cut into a group's parameters; a number, such as AdamW's step, is the same for all."""
    if not slices[0].dim():
        return [slices[0].clone() for _ in shapes]
    sizes = [shape.numel() for shape in shapes]
    whole = torch.cat(list(slices))[: sum(sizes)]
    return [part.reshape(shape).clone() for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def _names(row: Mapping, group: int) -> list[str]:
    """Names of a row's parameters that are in one group of the optimizer."""
    return [name for name, number in zip(row["names"], row["groups"], strict=True) if number == group]


def _gather(state: dict, comm: Communicator) -> list[dict]:
    """The states of all ranks, on rank 0."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    mine = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(comm.device)
    sizes = gather_numbers(len(mine), comm)
    nothing = mine.new_empty(0)
    inputs = [mine if rank == 0 else nothing for rank in range(comm.world_size)]
    outputs = [mine.new_empty(size if comm.rank == 0 else 0) for size in sizes]
    comm.all_to_all(outputs, inputs)
    return [torch.load(io.BytesIO(each.cpu().numpy().tobytes()), weights_only=True) for each in outputs if len(each)]
