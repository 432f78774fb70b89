"""Boxes: the part of a tensor that a rank holds or a file stores, as its first element and its shape.

    tensor (4, 6)     Box((1, 2), (2, 3))      rows 1 and 2 of columns 2, 3 and 4
    · · · · · ·
    · · █ █ █ ·       columns or rows, as tensor parallelism cuts, are boxes; a flat range, as ZeRO cuts, is at most
    · · █ █ █ ·       2 · dimensions − 1 of them: the end of a row, whole rows, the beginning of a row
    · · · · · ·

Source: torch.distributed.checkpoint, whose chunks are offsets and sizes, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A part of a tensor.

    Args:
        start: its first element's place in each dimension.
        shape: its extent in each; one of 0 for an empty box.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def slices(self, within: Box) -> tuple[slice, ...]:
        """Where the box lies in a tensor that holds a box around it."""
        begins = (own - outer for own, outer in zip(self.start, within.start, strict=True))
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, self.shape, strict=True))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it lies within a tensor of a shape."""
        ends = zip(self.start, self.shape, shape, strict=False)
        return len(self.start) == len(self.shape) == len(shape) and all(
            begin >= 0 and size >= 0 and begin + size <= extent for begin, size, extent in ends
        )


def overlap(one: Box, other: Box) -> Box | None:
    """Elements in both boxes of one tensor; None if there are none."""
    start = tuple(map(max, one.start, other.start))
    stop = (min(a + m, b + n) for a, m, b, n in zip(one.start, one.shape, other.start, other.shape, strict=True))
    shape = tuple(end - begin for begin, end in zip(start, stop, strict=True))
    return Box(start, shape) if all(size > 0 for size in shape) else None


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements start to stop of a flattened tensor as boxes: their elements one after the other are the range.

    Raises:
        ValueError: if the range is not within the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"elements {start} to {stop} are not a range of a tensor {tuple(shape)}")
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = list(shape[1:])
    (first, skipped), (last, left) = divmod(start, math.prod(inner)), divmod(stop, math.prod(inner))
    if first == last:
        return _in_row(inner, first, skipped, left)
    found = _in_row(inner, first, skipped, math.prod(inner)) if skipped else []
    rows = range(first + bool(skipped), last)
    if rows:
        found.append(Box((rows.start, *(0 for _ in inner)), (len(rows), *inner)))
    return found + _in_row(inner, last, 0, left)


def _in_row(inner: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *box.start), (1, *box.shape)) for box in boxes_of_range(inner, start, stop)]
