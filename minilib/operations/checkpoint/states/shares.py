"""Who writes what: of a box that several ranks hold alike each writes a part, so that every byte is written once.

    4 replicas hold      │ embed ········ │ qkv ···· │ project ·· │ … │        end to end, in bytes
    they write           │ rank 0 ···· │ rank 1 ···· │ rank 2 ···· │ rank 3 ···· │

Boxes that one rank alone holds, such as slices of ZeRO, are written by that rank. All ranks tell what they hold, and
each works out the same answer.

In production: torch.distributed.checkpoint lets the least loaded rank write all of a tensor that several have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from minilib.operations.checkpoint.format.boxes import Box, boxes_of_range
from minilib.operations.checkpoint.format.table import (
    Fragment,
    HeldBox,
    StateMismatch,
    StoredBox,
    StoredTensor,
    dtype_name,
    dtype_of,
)


def held_by(fragments: Iterable[Fragment]) -> list[HeldBox]:
    """What a rank holds.

    Raises:
        StateMismatch: if it holds a box twice, or memory of another shape than its box.
    """
    held = {}
    for name, shape, box, data in fragments:
        if tuple(data.shape) != box.shape:
            raise StateMismatch(f"{name}: {box} is of another shape than its memory, {tuple(data.shape)}")
        if (name, box) in held:
            raise StateMismatch(f"{name}: this rank holds {box} twice; two states use one name")
        held[name, box] = HeldBox(name, dtype_name(data.dtype), tuple(shape), box)
    return list(held.values())


def packed_holdings(held: Iterable[HeldBox]) -> str:
    """As text, to be told to other ranks."""
    return json.dumps(list(held))


def unpacked_holdings(text: str) -> list[HeldBox]:
    """The inverse of `packed_holdings`."""
    return [
        HeldBox(name, dtype, tuple(shape), Box(tuple(start), tuple(extent)))
        for name, dtype, shape, (start, extent) in json.loads(text)
    ]


def shares_of(holdings: Sequence[Sequence[HeldBox]]) -> list[list[HeldBox]]:
    """What each rank writes.

    Args:
        holdings: of every rank.

    Returns:
        For each rank boxes, each within one that it holds: together every element once. Of what several ranks hold
        alike their shares differ by less than an element.

    Raises:
        StateMismatch: if ranks differ over a tensor's shape or dtype, or hold not every element, or boxes that
            overlap and differ.
    """
    holders: dict[HeldBox, list[int]] = {}
    for rank, held in enumerate(holdings):
        for box in held:
            holders.setdefault(box, []).append(rank)
    _check_agreement(holders)
    rows: dict[tuple[int, ...], list[HeldBox]] = {}
    for box, ranks in holders.items():
        rows.setdefault(tuple(ranks), []).append(box)
    shares: list[list[HeldBox]] = [[] for _ in holdings]
    for ranks, row in rows.items():
        for rank, mine in zip(ranks, _cut_evenly(row, len(ranks)), strict=True):
            shares[rank] += mine
    return shares


def _cut_evenly(row: Sequence[HeldBox], count: int) -> list[list[HeldBox]]:
    """Boxes end to end, cut into as many parts of equal bytes."""
    total = sum(box.nbytes for box in row)
    bounds = [total * number // count for number in range(count + 1)]
    parts: list[list[HeldBox]] = [[] for _ in range(count)]
    at = 0
    for held in row:
        places = [min(max(0, round((bound - at) / held.itemsize)), held.box.numel) for bound in bounds]
        for part, start, stop in zip(parts, places, places[1:], strict=False):
            for inner in boxes_of_range(held.box.shape, start, stop):
                part.append(held._replace(box=_moved(inner, held.box)))
        at += held.nbytes
    return parts


def _moved(inner: Box, outer: Box) -> Box:
    return Box(tuple(a + b for a, b in zip(inner.start, outer.start, strict=True)), inner.shape)


def _check_agreement(holders: Mapping[HeldBox, Sequence[int]]) -> None:
    tensors: dict[str, list[HeldBox]] = {}
    for held, ranks in holders.items():
        first = tensors.setdefault(held.name, [held])[0]
        if (held.dtype, held.shape) != (first.dtype, first.shape):
            raise StateMismatch(f"{held.name} is {held.dtype} {held.shape} on rank {ranks[0]}, and {first.dtype} "
                                f"{first.shape} on rank {holders[first][0]}: all ranks save one model")  # fmt: skip
        tensors[held.name].append(held)
    for name, (first, *boxes) in tensors.items():
        whole = tuple(StoredBox(held.box, "", 0) for held in boxes)
        StoredTensor(dtype_of(first.dtype), first.shape, whole).check_whole(name)
