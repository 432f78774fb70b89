"""A part as a file: boxes one after the other, written in blocks, and a checksum of every block.

    part    │ box of layers.0.qkv │ ·· │ box of layers.0.project │ ·· │ …        each box begins at a multiple of 64
    block   0 │ 1 │ 2 │ 3 │ …                                                    crc32 of each, kept in the manifest

A reader that needs some bytes reads the blocks that hold them and checks those, so that it need not read a whole part
to know that its bytes are the ones that were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import round_up
from minilib.mechanisms.journaling import CreateFile, DiskStep, ManifestEntry, SyncFile, WriteFile
from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.table import Fragment, HeldBox

ALIGNMENT = 64  # bytes: of a cache line, and of every dtype
BLOCK = 2**20  # bytes: it stays in a core's own cache from the copy to the checksum to the write
CRC_BYTES = 4


@dataclass(frozen=True)
class PartContents:
    """Where a rank's boxes lie in its part.

    Args:
        boxes: in order.
        offsets: bytes in front of each.
        size: bytes of the part.
    """

    boxes: tuple[HeldBox, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, boxes: Iterable[HeldBox]) -> PartContents:
        """One box after the other."""
        boxes, offsets, at = tuple(boxes), [], 0
        for box in boxes:
            at = round_up(at, ALIGNMENT)
            offsets.append(at)
            at += box.nbytes
        return cls(boxes, tuple(offsets), at)

    def views(self, fragments: Iterable[Fragment]) -> list[Tensor]:
        """The memory of each box, from the fragments that hold it."""
        held: dict[str, list[Fragment]] = {}
        for fragment in fragments:
            held.setdefault(fragment.name, []).append(fragment)
        return [_view(box, held[box.name]) for box in self.boxes]


def snapshot(contents: PartContents, views: Sequence[Tensor], into: Tensor) -> None:
    """Copy the memory of all boxes into a buffer, as the part will hold them.

    Args:
        contents: of the part.
        views: see `PartContents.views`; on any device.
        into: (size,) uint8, zeros where no box lies.
    """
    for held, offset, view in zip(contents.boxes, contents.offsets, views, strict=True):
        room = into[offset : offset + held.nbytes].view(view.dtype).view(view.shape)
        room.copy_(view, non_blocking=True)
    if any(view.is_cuda for view in views):
        torch.cuda.synchronize()  # the next step may change what is copied


def staged_blocks(contents: PartContents, views: Sequence[Tensor], block_bytes: int) -> Iterator[memoryview]:
    """The blocks of a part straight from where its boxes lie; one is valid until the next is asked for.

    Cost: memory of one block, through which go those that hold parts of several boxes; and of a copy of a box that is
        on a GPU or not contiguous.
    """
    block = bytearray(block_bytes)
    filled = 0
    for offset, view in zip(contents.offsets, views, strict=True):
        data = as_bytes(view.detach().cpu().contiguous())
        padding = memoryview(bytes((offset - filled) % ALIGNMENT))
        for source in (padding, data):
            while source:
                place = filled % block_bytes
                count = min(len(source), block_bytes - place)
                if count == block_bytes:  # all of it lies in one box
                    yield source[:count]
                else:
                    block[place : place + count] = source[:count]
                    if place + count == block_bytes:
                        yield memoryview(block)
                source, filled = source[count:], filled + count
    if filled % block_bytes:
        yield memoryview(block)[: filled % block_bytes]


def cut_blocks(part: memoryview, block_bytes: int) -> Iterator[memoryview]:
    """The blocks of a part that is in memory."""
    return (part[at : at + block_bytes] for at in range(0, len(part), block_bytes))


def part_steps(name: str, blocks: Iterable[memoryview], checksums: bytearray) -> Iterator[DiskStep]:
    """Write a part under its own name and make its bytes durable, as `journaling.write_part` does, block by block.

    A second thread computes the checksum of a block while the first one writes it.

    Args:
        name: one that no manifest holds.
        blocks: of its bytes; all but the last of one size.
        checksums: gets 4 bytes a block.

    Cost: one fsync; each byte is read once for its checksum and once by the kernel.
    """
    yield CreateFile(name)
    offset = 0
    with ThreadPoolExecutor(1, "checksum") as beside:
        for block in blocks:
            checksum = beside.submit(block_checksum, block)
            yield WriteFile(name, block, offset)
            offset += len(block)
            checksums += checksum.result()
    yield SyncFile(name)


def block_checksum(block: memoryview) -> bytes:
    """The CRC-32 of a block, as it is kept."""
    return crc32(block).to_bytes(CRC_BYTES, "little")


def agrees(block: memoryview, number: int, checksums: bytes) -> bool:
    """Whether the block of this number is the one whose checksum was kept."""
    return block_checksum(block) == checksums[number * CRC_BYTES : (number + 1) * CRC_BYTES]


def part_entry(size: int, checksums: bytes) -> ManifestEntry:
    """What a manifest says of a part: its size, and the digest of its blocks' checksums."""
    return ManifestEntry(size, ManifestEntry.of(checksums, "crc32").digest)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, of any dtype."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _view(held: HeldBox, fragments: Sequence[Fragment]) -> Tensor:
    for fragment in fragments:
        if _within(held.box, fragment.box):
            return fragment.data[held.box.slices(fragment.box)]
    raise AssertionError(f"this rank's share has {held.box} of {held.name}, which it does not hold")


def _within(inner: Box, outer: Box) -> bool:
    return all(
        b <= a and a + m <= b + n for a, m, b, n in zip(inner.start, inner.shape, outer.start, outer.shape, strict=True)
    )
