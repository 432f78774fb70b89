"""Read the boxes that a rank needs from the parts that hold them: the blocks with their bytes, and no others.

    needed        rows 2 … 5 of a tensor
    stored        rows 0 … 3 in part 0, rows 4 … 7 in part 1
    read          the blocks of part 0 with rows 2, 3, and those of part 1 with rows 4, 5; each is checked

A tensor that was cut by rows and is needed by columns is read row by row, where a row is longer than a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilib.operations.checkpoint.format.blocks import BlockReader, RangeSource, ReadTally
from minilib.operations.checkpoint.format.boxes import Box, overlap
from minilib.operations.checkpoint.format.table import Fragment, StoredBox, StoredTensor

WINDOW = 4 * 2**20  # bytes of a part in which what is read at a time lies, unless it is one element
LONGEST_ELEMENT = 16  # bytes


class _Request(NamedTuple):
    """Elements of one stored box that go into one fragment."""

    stored: StoredBox
    box: Box
    fragment: Fragment

    def first_byte(self) -> int:
        return self.stored.offset + _place(self.box.start, self.stored.box) * self.fragment.data.itemsize

    def end_byte(self) -> int:
        last = tuple(a + n - 1 for a, n in zip(self.box.start, self.box.shape, strict=True))
        return self.stored.offset + (_place(last, self.stored.box) + 1) * self.fragment.data.itemsize


class PartReader:
    """Reads checked blocks of parts into fragments.

    Args:
        source: of the parts.
        checksums: part → 4 bytes a block.
        sizes: part → bytes.
        block_bytes: of a block.

    Attributes:
        tally: what was read so far.
    """

    def __init__(
        self, source: RangeSource, checksums: Mapping[str, bytes], sizes: Mapping[str, int], block_bytes: int
    ) -> None:
        window_bytes = WINDOW + 2 * block_bytes + LONGEST_ELEMENT
        self._blocks = BlockReader(source, checksums, sizes, block_bytes, window_bytes)

    @property
    def tally(self) -> ReadTally:
        return self._blocks.tally

    @torch.no_grad()
    def read(self, fragments: Iterable[Fragment], table: Mapping[str, StoredTensor]) -> None:
        """Fill fragments, in the order of the parts' bytes.

        Raises:
            PartDamaged: if a part is missing, short or changed; fragments may have been filled in part.
        """
        requests = [small for request in _requests(fragments, table) for small in _small(request)]
        requests.sort(key=lambda request: (request.stored.part, request.first_byte()))
        with self._blocks:
            for group in _groups(requests):
                self._serve(group)

    def _serve(self, group: Sequence[_Request]) -> None:
        part = group[0].stored.part
        ranges = [each for request in group for each in _block_ranges(request, self._blocks.block_bytes)]
        window, base = self._blocks.read(part, _merged(ranges))
        for request in group:
            _copy_from(window, base, request)
            self.tally.needed += request.box.numel * request.fragment.data.itemsize
        if part not in self.tally.parts:
            self.tally.parts += (part,)


def parts_needed(fragments: Iterable[Fragment], table: Mapping[str, StoredTensor]) -> set[str]:
    """Names of the parts that hold anything of the fragments."""
    return {request.stored.part for request in _requests(fragments, table)}


def _requests(fragments: Iterable[Fragment], table: Mapping[str, StoredTensor]) -> Iterator[_Request]:
    for fragment in fragments:
        for stored in table[fragment.name].boxes:
            if box := overlap(fragment.box, stored.box):
                yield _Request(stored, box, fragment)


def _small(request: _Request) -> Iterator[_Request]:
    """The same elements in requests of which none spans more than a window, unless it is one element."""
    box = request.box
    if request.end_byte() - request.first_byte() <= WINDOW or box.numel <= 1:
        yield request
        return
    dim = next(dim for dim, size in enumerate(box.shape) if size > 1)
    half = box.shape[dim] // 2
    for begin, size in ((0, half), (half, box.shape[dim] - half)):
        start, shape = list(box.start), list(box.shape)
        start[dim], shape[dim] = start[dim] + begin, size
        yield from _small(request._replace(box=Box(tuple(start), tuple(shape))))


def _groups(requests: Iterable[_Request]) -> Iterator[list[_Request]]:
    """Requests in order, so many at a time that they lie within a window of one part."""
    group: list[_Request] = []
    for request in requests:
        if group:
            (first, *_), part = group, request.stored.part
            if part != first.stored.part or request.end_byte() - first.first_byte() > WINDOW:
                yield group
                group = []
        group.append(request)
    if group:
        yield group


def _copy_from(window: Tensor, base: int, request: _Request) -> None:
    """Copy a request's elements out of a window, whose first byte is the part's byte `base`."""
    stored, box, fragment = request
    values, dtype = window[request.first_byte() - base : request.end_byte() - base], fragment.data.dtype
    if values.data_ptr() % dtype.itemsize:
        values = values.clone()
    values = values.view(dtype).as_strided(box.shape, _strides(stored.box.shape))
    fragment.data.detach()[box.slices(fragment.box)].copy_(values)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch or overlap made one."""
    found: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            first, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((first, stop))
    return found


def _block_ranges(request: _Request, block_bytes: int) -> list[tuple[int, int]]:
    """Runs of blocks, (first, last + 1), with bytes that the request needs."""
    begin, end = request.first_byte(), request.end_byte()
    shape, strides = request.box.shape, _strides(request.stored.box.shape)
    run, dims = 1, len(shape)
    while dims and strides[dims - 1] == run:  # dimensions whose elements are side by side
        run *= shape[dims - 1]
        dims -= 1
    if not dims:
        return [(begin // block_bytes, (end - 1) // block_bytes + 1)]
    starts = np.zeros((1,), dtype=np.int64)
    for size, stride in zip(shape[:dims], strides[:dims], strict=True):
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    itemsize = request.fragment.data.itemsize
    first = (begin + starts * itemsize) // block_bytes
    last = (begin + (starts + run) * itemsize - 1) // block_bytes
    gaps = np.flatnonzero(first[1:] > last[:-1] + 1)
    begins, ends = first[np.r_[0, gaps + 1]], last[np.r_[gaps, len(last) - 1]]
    assert ends[-1] == (end - 1) // block_bytes
    return [(int(one), int(other) + 1) for one, other in zip(begins, ends, strict=True)]


def _place(at: tuple[int, ...], within: Box) -> int:
    """Elements of a box in front of the one at a place of the tensor."""
    strides = _strides(within.shape)
    return sum((a - b) * stride for a, b, stride in zip(at, within.start, strides, strict=True))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
