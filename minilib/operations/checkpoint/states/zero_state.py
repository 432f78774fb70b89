"""ZeRO's rows as fragments: each rank's slice of a row is a few boxes of the parameters that lie in it.

row       │ qkv ········ │ project ··· │ gate_up ·········· │ padding
rank 1              │ ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ │                      the end of qkv, project, the beginning of gate_up
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from minilib.operations.checkpoint.format.boxes import Box, boxes_of_range
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch, StoredTensor
from minilib.operations.checkpoint.states.model_state import (
    MODEL,
    OPTIMIZER,
    group_options,
    keys_by_name,
    make_room,
    persistent_buffers,
    set_options,
    tensors_of,
    whole_fragment,
)
from minilib.parallel.zero import Zero
from minilib.parallel.zero.row import Part, Row


class ZeroState:
    """A model under ZeRO, in any stage; of parameters the optimizer's masters are saved.

    Args:
        zero: of the model.
    """

    def __init__(self, zero: Zero) -> None:
        self._zero = zero

    def fragments(self) -> list[Fragment]:
        """See `Saveable`."""
        found = []
        for row in self._zero.rows:
            start = row.owned.start
            found += [each._replace(name=MODEL + each.name) for each in _in_row(row, row.master, start)]
            for part in row.parts:
                names = _names(row, part.group)
                for key, value in tensors_of(names[0], self._zero.optimizer.state[part.values]):
                    for each in _moments(row, part, names, value):
                        found.append(each._replace(name=f"{OPTIMIZER}{each.name}.{key}"))
        for name, buffer in persistent_buffers(self._zero.model):
            found += [each._replace(name=MODEL + name) for each in whole_fragment(name, buffer)]
        return found

    def values(self) -> dict:
        """The options of the optimizer's groups."""
        return {"param_groups": [group_options(group) for group in self._zero.optimizer.param_groups]}

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        """Give each part of a row the moments that are stored, zeros at first, and no others.

        Raises:
            StateMismatch: if parameters of one group have different ones.
        """
        kept = keys_by_name(stored)
        for row in self._zero.rows:
            shapes = dict(zip(row.layout.names, row.layout.shapes, strict=True))
            for part in row.parts:
                names = _names(row, part.group)
                for name in names:
                    if set(kept.get(name, ())) != set(kept.get(names[0], ())):
                        raise StateMismatch(f"the checkpoint has {sorted(kept.get(name, ()))} of {name}, and "
                                            f"{sorted(kept.get(names[0], ()))} of {names[0]}: ZeRO keeps one row of "
                                            "each for both")  # fmt: skip
                wanted = {key: stored[f"{OPTIMIZER}{names[0]}.{key}"] for key in kept.get(names[0], ())}
                make_room(self._zero.optimizer.state[part.values], part.values, shapes[names[0]], wanted)
        return set()

    def accept(self, values: Mapping) -> None:
        """Forget gradients, set the options, and send the masters to where parameters are used. A collective."""
        self._zero.zero_grad()
        set_options(self._zero.optimizer, values["param_groups"])
        for row in self._zero.rows:
            row.publish()
        self._zero.use_anew()


def _names(row: Row, group: int) -> list[str]:
    return [name for name, of in zip(row.layout.names, row.layout.groups, strict=True) if of == group]


def _moments(row: Row, part: Part, names: list[str], value: Tensor) -> Iterator[Fragment]:
    """What a part of a row has of one key of the optimizer's state; a step counts for each parameter of the group."""
    if value.dim() == 0:
        for name in names:
            yield from whole_fragment(name, value)
    elif value.shape == part.values.shape:
        yield from _in_row(row, value, row.owned.start + part.span.start, names)
    else:
        raise StateMismatch(f"the optimizer keeps {tuple(value.shape)} for a slice {tuple(part.values.shape)}")


def _in_row(row: Row, values: Tensor, start: int, names: list[str] | None = None) -> Iterator[Fragment]:
    """Boxes of the parameters whose elements a flat tensor has, which begins at a place of the row."""
    stop = start + len(values)
    for name, shape, (first, last) in zip(row.layout.names, row.layout.shapes, row.layout.spans, strict=True):
        if names is not None and name not in names:
            continue
        if first == last:  # it has no elements: every rank has all of it
            yield Fragment(name, tuple(shape), Box.whole(shape), values.new_empty(shape))
            continue
        at, end = (min(max(place, first), last) for place in (start, stop))
        for box in boxes_of_range(shape, at - first, end - first):
            yield Fragment(name, tuple(shape), box, values[at - start : at - start + box.numel].view(box.shape))
            at += box.numel
