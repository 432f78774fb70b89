"""Slices: one flat row of elements cut into equal, padded parts, and the copies that take one cut to another.

    7 elements on 3 shards    │ 0 1 2 │ 3 4 5 │ 6 · · │         · padding
    the same on 2             │ 0 1 2 3 │ 4 5 6 · │

ZeRO and FSDP lay parameters, gradients and optimizer state out so, since reduce-scatter and all-gather want parts of
one length. A state that was saved on 4 ranks is loaded on 3 by the pieces of `reslice`.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020; Zhao et
al., "PyTorch FSDP", VLDB 2023, section 4.2 (flat parameters and their padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minilib.mechanisms.basics.arithmetic import ceil_div


class IncompleteSlices(ValueError):
    """Slices that overlap, leave a gap, or end before the elements do."""


class Piece(NamedTuple):
    """Elements that lie in one run in an old and in a new slice.

    Args:
        old_shard, new_shard: who has them, and who will.
        old_start, new_start: where they begin, counted from the beginning of that shard's own slice.
        length: elements, at least 1.
    """

    old_shard: int
    new_shard: int
    old_start: int
    new_start: int
    length: int


def slices(num_elements: int, num_shards: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut a row into one slice a shard, all of the same length.

    Args:
        num_elements: 0 or more.
        num_shards: 1 or more.
        multiple: every slice is a multiple of this long, for instance to keep it aligned.

    Returns:
        (start, stop) for each shard, stop exclusive. The row is padded up to the last stop: places from num_elements
        on hold padding, and with few elements whole slices do.

    Raises:
        ValueError: if a number is too small.

    Cost: fewer than num_shards · multiple elements of padding.
    """
    if num_elements < 0 or num_shards < 1 or multiple < 1:
        raise ValueError(
            f"slices need num_elements ≥ 0, num_shards ≥ 1 and multiple ≥ 1, "
            f"got {num_elements!r}, {num_shards!r} and {multiple!r}"
        )
    length = ceil_div(num_elements, num_shards * multiple) * multiple
    return [(shard * length, (shard + 1) * length) for shard in range(num_shards)]


def reslice(num_elements: int, old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> list[Piece]:
    """The fewest copies that turn one cut of a row into another. Padding is not copied.

    Args:
        num_elements: without padding.
        old, new: slices in order, each beginning where the one before ends; they need not be of one length.

    Returns:
        Pieces in the order of the elements: together every element once. What has old_shard ≠ new_shard travels.

    Raises:
        IncompleteSlices: if slices do not cover the elements, each once.

    Cost: at most len(old) + len(new) - 1 pieces.
    """
    _check(num_elements, old, "old")
    _check(num_elements, new, "new")
    pieces: list[Piece] = []
    position = i = j = 0
    while position < num_elements:
        while old[i][1] <= position:
            i += 1
        while new[j][1] <= position:
            j += 1
        stop = min(old[i][1], new[j][1], num_elements)
        pieces.append(Piece(i, j, position - old[i][0], position - new[j][0], stop - position))
        position = stop
    return pieces


def _check(num_elements: int, cut: Sequence[tuple[int, int]], name: str) -> None:
    position = 0
    for shard, (start, stop) in enumerate(cut):
        if start != position or stop < start:
            raise IncompleteSlices(
                f"{name} slice {shard} is {start} to {stop}; it must begin at {position}, where the one before ends, "
                "and not end before that"
            )
        position = stop
    if position < num_elements:
        raise IncompleteSlices(
            f"the {name} slices end at {position} and there are {num_elements} elements; cut with that number"
        )
