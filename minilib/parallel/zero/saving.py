"""States of ZeRO: a rank's own slices, loadable on another number of ranks, and the whole model's weights.

    saved on 4 ranks    │ 0 ······ │ 1 ······ │ 2 ······ │ 3 ·· pad │
    loaded on 3         │ 0 ········· │ 1 ········· │ 2 ······ pad │      each rank copies the pieces that it now owns

In the full state every parameter has its own name and shape, and no optimizer state comes along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from minilib.mechanisms.sharding.slicing import reslice
from minilib.parallel.zero.layout import Layout
from minilib.parallel.zero.row import Row
from minilib.ranks.collectives import Communicator


class Partitioned(Protocol):
    """What of `Zero` its state is read from and written to."""

    model: nn.Module
    comm: Communicator
    stage: int
    rows: list[Row]
    optimizer: torch.optim.Optimizer


class OtherModel(ValueError):
    """A state of another model, or of one that was cut into other units or groups; the message says which key."""


class IncompleteStates(ValueError):
    """Some rank's state is missing; the message says whose."""


def save_slices(zero: Partitioned) -> dict:
    """See `Zero.state_dict`."""
    rows = {}
    for row in zero.rows:
        optimizer = {
            part.group: {key: _copy(value) for key, value in zero.optimizer.state[part.values].items()}
            for part in row.parts
        }
        rows[row.layout.name] = {**_describe(row.layout), "values": row.master.clone(), "optimizer": optimizer}
    index, cut = _place(zero.stage, zero.comm.rank, zero.rows[0].layout)
    options = [{k: v for k, v in group.items() if k != "params"} for group in zero.optimizer.param_groups]
    return {"slice": index, "num_slices": len(cut), "rows": rows, "param_groups": options}


def load_slices(zero: Partitioned, states: Sequence[Mapping]) -> None:
    """See `Zero.load_state_dict`."""
    saved = _in_order(states)
    _check_rows({row.layout.name: row.layout for row in zero.rows}, saved[0]["rows"])
    _check_groups(zero, saved[0]["param_groups"])
    for row in zero.rows:
        theirs = [state["rows"][row.layout.name] for state in saved]
        _take_over(zero, row, [each["values"] for each in theirs], _cut_into(row.layout, len(saved)),
                   {part.group: [each["optimizer"][part.group] for each in theirs] for part in row.parts})  # fmt: skip
    _set_options(zero, saved[0]["param_groups"])


def load_by_name(
    zero: Partitioned, values: Mapping[str, Tensor], moments: Mapping[str, Mapping], param_groups: Sequence[Mapping]
) -> None:
    """See `Zero.load_by_name`: a row whose slices are its parameters, one each."""
    shapes = {name: shape for row in zero.rows for name, shape in zip(row.layout.names, row.layout.shapes, strict=True)}
    problem = next(_problems({name: values[name] for name in shapes if name in values}, shapes, shapes), "")
    if problem:
        raise OtherModel(problem)
    _check_groups(zero, param_groups)
    for row in zero.rows:
        flat = [values[name].reshape(-1) for name in row.layout.names]
        theirs = [_flat(moments.get(name, {})) for name in row.layout.names]
        _take_over(zero, row, flat, row.layout.spans, {part.group: theirs for part in row.parts})
    _set_options(zero, param_groups)


def save_full(zero: Partitioned, rank: int | None) -> dict[str, Tensor]:
    """See `Zero.full_state_dict`."""
    wanted = rank in (None, zero.comm.rank)
    values: dict[int, Tensor] = {}
    for row in zero.rows:
        for parameter, value in zip(row.parameters, row.values(), strict=True):
            if wanted:
                values[id(parameter)] = value
    if not wanted:
        return {}
    held = zero.model.state_dict(keep_vars=True)
    return {name: values[id(x)] if id(x) in values else x.detach().clone() for name, x in held.items()}


def load_full(zero: Partitioned, state: Mapping[str, Tensor] | None) -> None:
    """See `Zero.load_full_state_dict`."""
    shapes = {name: shape for row in zero.rows for name, shape in zip(row.layout.names, row.layout.shapes, strict=True)}
    held = zero.model.state_dict(keep_vars=True)
    problem = _problem(state, held, shapes) if zero.comm.rank == 0 else ""
    refused = torch.tensor([bool(problem)], device=zero.comm.device)
    zero.comm.broadcast(refused)
    if refused:
        raise OtherModel(problem or "rank 0 has refused the state; its error says why")
    for row in zero.rows:
        row.fill([state[name] for name in row.layout.names] if zero.comm.rank == 0 else None)
    parameters = set(zero.model.parameters())
    for name, buffer in held.items():
        if buffer not in parameters:
            if zero.comm.rank == 0:
                buffer.copy_(state[name])
            zero.comm.broadcast(buffer)


def _take_over(
    zero: Partitioned,
    row: Row,
    values: Sequence[Tensor],
    old: Sequence[tuple[int, int]],
    moments: Mapping[int, Sequence[Mapping]],
) -> None:
    """Fill what this rank owns of a row from slices of another cut.

    Args:
        values: of each old slice.
        old: (start, stop) of each.
        moments: group → the optimizer's state of each old slice's part of that group.
    """
    index, cut = _place(zero.stage, zero.comm.rank, row.layout)
    _collect(row.master, row.layout.numel, values, old, cut, index)
    for part in row.parts:
        first, last = row.layout.group_span(part.group)
        cuts = row.layout.group_cut(part.group, old), row.layout.group_cut(part.group, cut)
        zero.optimizer.state[part.values] = _moments(part.values, last - first, moments[part.group], *cuts, index)
    row.publish()


def _check_groups(zero: Partitioned, saved: Sequence[Mapping]) -> None:
    if len(saved) != len(zero.optimizer.param_groups):
        raise OtherModel(f"param_groups: the state has {len(saved)}, here are {len(zero.optimizer.param_groups)}")


def _set_options(zero: Partitioned, saved: Sequence[Mapping]) -> None:
    for group, options in zip(zero.optimizer.param_groups, saved, strict=True):
        group.update(options)


def _flat(moments: Mapping) -> dict:
    """A parameter's optimizer state with values for each element in a row; a number, such as AdamW's step, as it is."""
    return {key: x.reshape(-1) if isinstance(x, Tensor) and x.dim() else x for key, x in moments.items()}


def _place(stage: int, rank: int, layout: Layout) -> tuple[int, list[tuple[int, int]]]:
    """Which slice of which cut a rank owns."""
    return (0, [(0, layout.length)]) if stage == 0 else (rank, layout.slices)


def _describe(layout: Layout) -> dict:
    return {"names": list(layout.names), "shapes": [list(s) for s in layout.shapes], "groups": list(layout.groups)}


def _in_order(states: Sequence[Mapping]) -> list[Mapping]:
    """One state for each slice, by its number."""
    if isinstance(states, Mapping) or not states:
        raise IncompleteStates("load_state_dict takes the states of all ranks that saved, in a list; got one, or none")
    by_slice = {state["slice"]: state for state in states}
    num_slices = states[0]["num_slices"]
    missing = sorted(set(range(num_slices)) - set(by_slice))
    if missing or any(state["num_slices"] != num_slices for state in states):
        raise IncompleteStates(
            f"the state was saved as {num_slices} slices; got {sorted(by_slice)}, missing {missing}, of "
            f"{sorted({state['num_slices'] for state in states})}: pass what every rank of one run saved"
        )
    return [by_slice[number] for number in range(num_slices)]


def _cut_into(layout: Layout, num_slices: int) -> list[tuple[int, int]]:
    return Layout(layout.name, layout.names, layout.shapes, layout.groups, num_slices).slices


def _check_rows(mine: Mapping[str, Layout], theirs: Mapping[str, Mapping]) -> None:
    for name in {**mine, **theirs}:
        if name not in mine or name not in theirs:
            who = "the state has" if name in theirs else "this model has"
            raise OtherModel(f"{who} a unit {name!r}, and the other has none: {_MEND}")
        keys = [
            dict(zip(row["names"], zip(row["shapes"], row["groups"], strict=True), strict=True))
            for row in (_describe(mine[name]), theirs[name])
        ]
        for key in {**keys[0], **keys[1]}:
            here, there = (table.get(key, "nothing") for table in keys)
            if here != there:
                raise OtherModel(f"{key}: here (shape, group) is {here}, in the state it is {there}: {_MEND}")
        if list(keys[0]) != list(keys[1]):
            raise OtherModel(f"unit {name!r} has its parameters in another order than the state: {_MEND}")


_MEND = "load it into the model, blocks and param_groups that it was saved from"


def _collect(
    into: Tensor,
    numel: int,
    saved: Sequence[Tensor],
    old: Sequence[tuple[int, int]],
    new: Sequence[tuple[int, int]],
    index: int,
) -> None:
    """Fill slice `index` of the new cut from the slices of the old one."""
    for piece in reslice(numel, old, new):
        if piece.new_shard == index:
            part = saved[piece.old_shard][piece.old_start : piece.old_start + piece.length]
            into[piece.new_start : piece.new_start + piece.length].copy_(part)


def _moments(
    part: Tensor,
    numel: int,
    saved: Sequence[Mapping],
    old: Sequence[tuple[int, int]],
    new: Sequence[tuple[int, int]],
    index: int,
) -> dict:
    """An optimizer's state of one group's part of a row: values for each element are cut anew, others are copied.

    Old slices that have nothing of the group may have the state of another one, and are not read.
    """
    sizes = [stop - start for start, stop in old]
    number = next((number for number, size in enumerate(sizes) if size), 0)
    state = {}
    for key, first in saved[number].items():
        if isinstance(first, Tensor) and first.shape == (sizes[number],):
            state[key] = torch.zeros_like(part, dtype=first.dtype)
            _collect(state[key], numel, [each.get(key) for each in saved], old, new, index)
        else:
            state[key] = _copy(first)
    return state


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _problem(state: Mapping | None, held: Mapping[str, Tensor], shapes: Mapping[str, tuple]) -> str:
    """What is wrong with a full state; empty if nothing is."""
    if state is None:
        return "rank 0 has the state to load, and got None"
    return next(_problems(state, held, shapes), "")


def _problems(state: Mapping, held: Mapping[str, Tensor], shapes: Mapping[str, tuple]) -> Iterator[str]:
    for name in {**held, **state}:
        if name not in state:
            yield f"the state has no {name}, which this model has"
        elif name not in held:
            yield f"the state has {name}, which this model has not"
        else:
            expected = tuple(shapes.get(name, state[name].shape))
            if tuple(state[name].shape) != expected:
                yield f"{name} is {expected} here and {tuple(state[name].shape)} in the state"
