"""Read the boxes that a rank needs from the parts that hold them: the blocks with their bytes, and no others.

    needed        rows 2 … 5 of a tensor
    stored        rows 0 … 3 in part 0, rows 4 … 7 in part 1
    read          the blocks of part 0 with rows 2, 3, and those of part 1 with rows 4, 5; each is checked

A tensor that was cut by rows and is needed by columns is read row by row, where a row is longer than a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np
import torch

from minilib.mechanisms.journaling import PartDamaged
from minilib.operations.checkpoint.boxes import Box, overlap
from minilib.operations.checkpoint.table import Fragment, StoredBox, StoredTensor
from minilib.operations.checkpoint.writing import CRC_BYTES

WINDOW = 4 * 2**20  # bytes that are read at a time, at least a block


class RangeSource(Protocol):
    """Where parts are: a folder, or the memory of a host."""

    def read_into(self, name: str, offset: int, into: memoryview) -> int:
        """Read bytes of a part from an offset on; returns how many there are.

        Raises:
            FileNotFoundError: if there is no such part.
        """


@dataclass
class ReadTally:
    """What a load has read.

    Args:
        needed: bytes of the boxes that were asked for.
        read: bytes of blocks that were read for them.
        blocks: how many.
        parts: names of the parts that were touched.
    """

    needed: int = 0
    read: int = 0
    blocks: int = 0
    parts: tuple[str, ...] = ()


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
        self._source, self._checksums, self._sizes, self._block_bytes = source, checksums, sizes, block_bytes
        self._window = bytearray()
        self._last: tuple[str, int, slice, bytearray] = ("", -1, slice(0), self._window)  # the block that was read last
        self.tally = ReadTally()

    @torch.no_grad()
    def read(self, fragments: Iterable[Fragment], table: Mapping[str, StoredTensor]) -> None:
        """Fill fragments, in the order of the parts' bytes.

        Raises:
            PartDamaged: if a part is missing, short or changed; fragments may have been filled in part.
        """
        requests = [small for request in _requests(fragments, table) for small in _small(request)]
        for request in sorted(requests, key=lambda request: (request.stored.part, request.first_byte())):
            self._serve(request)

    def _serve(self, request: _Request) -> None:
        stored, box, fragment = request
        begin, end, part = request.first_byte(), request.end_byte(), stored.part
        base = begin // self._block_bytes * self._block_bytes
        self._make_room(end - base + self._block_bytes)
        for first, last in _block_ranges(request, self._block_bytes):
            self._read_blocks(part, first, last, base)
        count, itemsize = end - begin, fragment.data.itemsize
        values = torch.frombuffer(self._window, dtype=torch.uint8, count=count, offset=begin - base)
        if values.data_ptr() % itemsize:
            values = values.clone()
        values = values.view(fragment.data.dtype)
        strides = _strides(stored.box.shape)
        fragment.data.detach()[box.slices(fragment.box)].copy_(values.as_strided(box.shape, strides))
        self.tally.needed += box.numel * itemsize
        if part not in self.tally.parts:
            self.tally.parts += (part,)

    def _make_room(self, size: int) -> None:
        if len(self._window) < size:
            self._window = bytearray(size)

    def _read_blocks(self, part: str, first: int, last: int, base: int) -> None:
        """Blocks first to last, the latter excluded, into the window, whose first byte is the part's byte `base`."""
        size = self._block_bytes
        if self._last[:2] == (part, first):
            held = self._last[3][self._last[2]]
            place = slice(first * size - base, first * size - base + len(held))
            self._window[place] = held
            self._last = (part, first, place, self._window)
            first += 1
        if first == last:
            return
        wanted = min(last * size, self._sizes[part]) - first * size
        room = memoryview(self._window)[first * size - base : first * size - base + wanted]
        try:
            found = self._source.read_into(part, first * size, room)
        except FileNotFoundError as error:
            raise PartDamaged(f"{part} is missing, and the manifest says {self._sizes[part]:,} bytes") from error
        if found < wanted:
            raise PartDamaged(
                f"{part} ends at byte {first * size + found:,}, and the manifest says {self._sizes[part]:,}"
            )
        for block in range(first, last):
            data = room[(block - first) * size : (block - first + 1) * size]
            said = self._checksums[part][block * CRC_BYTES : (block + 1) * CRC_BYTES]
            if crc32(data).to_bytes(CRC_BYTES, "little") != said:
                raise PartDamaged(f"{part} is damaged between bytes {block * size:,} and {block * size + len(data):,}: "
                                  "they do not agree with their checksum")  # fmt: skip
        place = slice((last - 1) * size - base, first * size - base + wanted)
        self._last = (part, last - 1, place, self._window)
        self.tally.read += wanted
        self.tally.blocks += last - first


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


def _block_ranges(request: _Request, block_bytes: int) -> list[tuple[int, int]]:
    """Runs of blocks, (first, last + 1), with bytes that the request needs."""
    begin, end = request.first_byte(), request.end_byte()
    shape, strides = request.box.shape, _strides(request.stored.box.shape)
    run, dims = 1, len(shape)
    while dims and strides[dims - 1] == run:  # dimensions whose elements are side by side
        run *= shape[dims - 1]
        dims -= 1
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
