"""How ZeRO lays a model out: which parameters make a unit, and where each lies in its unit's row.

    unit      the outer one: what belongs to no block │ block 0 │ block 1 │ …
    row       one unit's parameters end to end, those of one optimizer group together, padded

              weight ······· gate ········ │ norm ·· bias · │ padding       2 groups
              rank 0 ··· │ rank 1 ··· │ rank 2 ··· │ rank 3 ···             4 slices, one collective for all of it

Sources: Rajbhandari et al., SC 2020 (ZeRO); Zhao et al., VLDB 2023, section 4.2 (FSDP's units and flat parameters).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from minilib.mechanisms.sharding.slicing import slices

OUTER = "outer"  # name of the unit of everything that is in no block
FROZEN = -1  # group of parameters that no optimizer updates


class UnsuitableModel(ValueError):
    """A model that cannot be laid out so; the message says which part, and what to do."""


@dataclass(frozen=True)
class Layout:
    """Where parameters lie in one row. Equal layouts hold the same parameters in the same places.

    Args:
        name: of the row.
        names, shapes, groups: of each parameter, in order; groups are the optimizer's, ascending, or FROZEN.
        num_slices: into how many equal slices the row is padded.
    """

    name: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    num_slices: int

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each parameter."""
        stops = list(accumulate(torch.Size(shape).numel() for shape in self.shapes))
        return list(zip([0, *stops], stops, strict=False))

    @property
    def numel(self) -> int:
        """Elements without padding."""
        return self.spans[-1][1]

    @cached_property
    def slices(self) -> list[tuple[int, int]]:
        """(start, stop) of each rank's slice."""
        return slices(self.numel, self.num_slices)

    @property
    def length(self) -> int:
        """Elements with padding."""
        return self.slices[-1][1]

    def group_span(self, group: int) -> tuple[int, int]:
        """(start, stop) of all parameters of a group that this row has."""
        spans = [span for span, of in zip(self.spans, self.groups, strict=True) if of == group]
        return spans[0][0], spans[-1][1]

    def group_cut(self, group: int, cut: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """What each slice of a cut has of a group, counted from the group's beginning; start = stop for nothing."""
        first, last = self.group_span(group)
        return [tuple(min(max(place, first), last) - first for place in span) for span in cut]


@dataclass(frozen=True)
class Unit:
    """What is gathered and reduced together.

    Args:
        name: of its module within the model, or OUTER.
        module: None for the outer unit.
        parameters: name within the model → parameter; a tied one has one name.
    """

    name: str
    module: nn.Module | None
    parameters: Mapping[str, nn.Parameter]


def units_of(model: nn.Module, blocks: Collection[nn.Module] | None = None) -> list[Unit]:
    """Divide a model's parameters.

    Args:
        model: what is trained.
        blocks: modules that become units, in the order in which the forward uses them, each called as a module;
            entries of the topmost ModuleLists and Sequentials if left out.

    Returns:
        The outer unit, which has what is in no block and what several share; then one for each block with parameters.

    Raises:
        UnsuitableModel: if a block is not in the model, or in another block.
    """
    blocks = list(_default_blocks(model) if blocks is None else blocks)
    names: dict[nn.Module, list[str]] = {block: [] for block in blocks}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name)
    _check_blocks(model, names)
    block_of = {f"{name}.": block for block, found in names.items() for name in found}
    users: dict[nn.Parameter, set[nn.Module | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = (block for prefix, block in block_of.items() if name.startswith(prefix))
        users.setdefault(parameter, set()).add(next(inside, None))
    held: dict[nn.Module | None, dict[str, nn.Parameter]] = {block: {} for block in (None, *names)}
    for name, parameter in model.named_parameters():
        owner = users[parameter]
        held[next(iter(owner)) if len(owner) == 1 else None][name] = parameter
    named = [(names[block][0], block) for block in names if held[block]]
    return [Unit(OUTER, None, held[None]), *(Unit(name, block, held[block]) for name, block in named)]


def group_of(model: nn.Module, groups: Iterable[Mapping]) -> dict[nn.Parameter, int]:
    """For each parameter to train, the number of its optimizer group.

    Raises:
        UnsuitableModel: if it is in none, or in two, or there is nothing to train.
    """
    number: dict[nn.Parameter, int] = {}
    twice: set[nn.Parameter] = set()
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            if parameter in number:
                twice.add(parameter)
            number[parameter] = index
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UnsuitableModel("this model has no parameter to train: all are frozen, or there is none")
    for name, parameter in trained.items():
        if parameter not in number or parameter in twice:
            where = "two groups" if parameter in twice else "no group"
            raise UnsuitableModel(f"{name} is in {where} of param_groups: put every trained parameter into one")
    return {parameter: number[parameter] for parameter in trained.values()}


def check_parameters(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what does not fit into a row.

    Raises:
        UnsuitableModel: if a parameter is not a dense tensor of that dtype on that device.
    """
    for name, p in model.named_parameters():
        if p.device != device or p.layout != torch.strided or p.dtype != dtype:
            raise UnsuitableModel(
                f"{name} is {p.dtype}, {p.layout}, on {p.device}; ZeRO with this communicator takes dense {dtype} "
                f"parameters on {device}: build the model there, or convert it with model.to('{device}', {dtype})"
            )


def layouts_of(
    unit: Unit, number: Mapping[nn.Parameter, int], world_size: int
) -> list[tuple[Layout, list[nn.Parameter]]]:
    """The rows of a unit, with their parameters: one for those that are in a group, and one for the frozen."""
    trained = sorted((item for item in unit.parameters.items() if item[1] in number), key=lambda item: number[item[1]])
    frozen = [item for item in unit.parameters.items() if item[1] not in number]
    rows = []
    for items, name in ((trained, unit.name), (frozen, f"{unit.name} (frozen)")):
        if items:
            names, parameters = zip(*items, strict=True)
            shapes, groups = [tuple(p.shape) for p in parameters], [number.get(p, FROZEN) for p in parameters]
            rows.append((Layout(name, names, tuple(shapes), tuple(groups), world_size), list(parameters)))
    return rows


def _default_blocks(model: nn.Module) -> list[nn.Module]:
    """Entries of the topmost lists, but for those that are also part of another entry."""
    entries = dict.fromkeys(_entries(model))
    inner = {module for entry in entries for module in entry.modules() if module is not entry}
    return [entry for entry in entries if entry not in inner]


def _entries(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, nn.ModuleList | nn.Sequential):
        yield from model
        return
    for child in model.children():
        yield from _entries(child)


def _check_blocks(model: nn.Module, names: Mapping[nn.Module, Collection[str]]) -> None:
    for block, found in names.items():
        if not found or block is model:
            raise UnsuitableModel(f"a block is a module within the model; {type(block).__name__} is not: {block}")
        inner = set(block.modules()) & set(names) - {block}
        if inner:
            inside = next(iter(names[inner.pop()]))
            raise UnsuitableModel(f"block {inside} lies within block {next(iter(found))}: give one of the two")
