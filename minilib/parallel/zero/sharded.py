"""ZeRO as the trainer uses it: its state saves as that of one whole model, and loads from it on any number of ranks.

    on ranks    row "layers.0": │ rank 0 ······ │ rank 1 ······ │ padding      values and moments, end to end
    saved       layers.0.qkv.weight, its exp_avg, its exp_avg_sq, …            as model.state_dict() and AdamW have them

A model that fits on no single host saves `Zero.state_dict` of each rank instead.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from minilib.parallel.zero.zero import Zero
from minilib.ranks.agreement import gather_numbers
from minilib.ranks.collectives import Communicator


class Sharded:
    """An `engines.Engine` over Zero.

    Args:
        zero: made with the same groups.
        groups: of the model's parameters, in the optimizer's order.
    """

    def __init__(self, zero: Zero, groups: Iterable[Mapping]) -> None:
        name = {parameter: name for name, parameter in zero.model.named_parameters()}
        self._zero, self.optimizer = zero, zero.optimizer
        self._names = [[name[parameter] for parameter in group["params"]] for group in groups]
        self._order = [name for names in self._names for name in names]
        self.zero_grad, self.clip_grad_norm, self.step = zero.zero_grad, zero.clip_grad_norm, zero.step

    def full_state_dict(self) -> dict:
        """See `engines.Engine`; other ranks than 0 get nothing.

        Cost: rank 0 holds the whole state, twice for a moment.
        """
        model = self._zero.full_state_dict(rank=0)
        own = self._zero.state_dict()
        states = [own] if own["num_slices"] == 1 else _gather(own, self._zero.comm)
        if self._zero.comm.rank > 0:
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
        """See `engines.Engine`; each rank keeps its slices of the whole state."""
        saved = state["optimizer"]
        moments = {name: saved["state"].get(number, {}) for number, name in enumerate(self._order)}
        rows = {}
        for name, row in self._zero.state_dict()["rows"].items():
            values = torch.cat([state["model"][n].reshape(-1) for n in row["names"]])
            optimizer = {group: _end_to_end([moments[n] for n in _names(row, group)]) for group in row["optimizer"]}
            rows[name] = {**row, "values": values, "optimizer": optimizer}
        options = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
        for name, buffer in self._zero.model.named_buffers():
            if name in state["model"]:  # the others follow from the config
                buffer.copy_(state["model"][name])
        self._zero.load_state_dict([{"slice": 0, "num_slices": 1, "rows": rows, "param_groups": options}])


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
    """What each of a group's parameters has of the ranks' slices; a number, such as AdamW's step, they all have."""
    if not slices[0].dim():
        return [slices[0].clone() for _ in shapes]
    sizes = [shape.numel() for shape in shapes]
    whole = torch.cat(list(slices))[: sum(sizes)]
    return [part.reshape(shape).clone() for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def _end_to_end(moments: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse for one group of one row: what parameters have, one after another."""
    return {
        key: torch.cat([each[key].reshape(-1) for each in moments]) if first.dim() else first
        for key, first in moments[0].items()
    }


def _names(row: Mapping, group: int) -> list[str]:
    """Of a row's parameters that are in an optimizer's group."""
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
