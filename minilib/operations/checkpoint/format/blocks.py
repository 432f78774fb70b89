"""Blocks of parts, read into windows of memory; other threads check them while the reader goes on.

reader      read 0 │ copy 0 │ read 1 │ copy 1 │ read 2 │ copy 2 │ …     into one window after the other
checkers             check 0 ───────── │ check 1 ───────── │ …          before a window is used again
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from minilib.mechanisms.journaling import PartDamaged
from minilib.operations.checkpoint.format.writing import agrees, cut_blocks

WINDOWS = 4  # that are being filled or checked at a time


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


class _Window:
    """Memory for blocks of one part, and the checks of what was read into it last."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8)
        self.checks: list[Future[None]] = []

    def settle(self) -> None:
        """Wait for all checks; raise the first failure."""
        while self.checks:
            self.checks.pop(0).result()


class BlockReader:
    """Reads blocks of parts. A context: at its end all of them are checked.

    Args:
        source: of the parts.
        checksums: part → 4 bytes a block.
        sizes: part → bytes.
        block_bytes: of a block.
        window_bytes: from the first block to the last of one `read`, at most.

    Attributes:
        tally: what was read so far.

    Raises:
        PartDamaged: at the end of the context if a block was damaged, unless `read` has said so before.
    """

    def __init__(
        self,
        source: RangeSource,
        checksums: Mapping[str, bytes],
        sizes: Mapping[str, int],
        block_bytes: int,
        window_bytes: int,
    ) -> None:
        self._source, self._checksums, self._sizes = source, checksums, sizes
        self.block_bytes, self._window_bytes = block_bytes, window_bytes
        self.tally = ReadTally()

    def __enter__(self) -> Self:
        self._windows = deque(_Window(self._window_bytes) for _ in range(WINDOWS))
        self._last: tuple[str, int, memoryview] = ("", -1, memoryview(b""))  # the block that was read last
        self._checker = ThreadPoolExecutor(1, "checksum")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._checker.shutdown()
        for window in self._windows if kind is None else ():
            window.settle()

    def read(self, part: str, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
        """Read runs of blocks, in order: (first, last + 1).

        Returns:
            Memory that holds them, until a few calls later, (window_bytes,) uint8; and the place in the part of its
            first byte.

        Raises:
            PartDamaged: if the part is missing or short, or a block that was read before is damaged.
        """
        window = self._windows.popleft()
        window.settle()
        self._windows.append(window)
        base, memory = runs[0][0] * self.block_bytes, memoryview(window.memory.numpy())
        for first, last in runs:
            self._read_run(part, first, last, memory[first * self.block_bytes - base :], window.checks)
        return window.memory, base

    def _read_run(self, part: str, first: int, last: int, room: memoryview, checks: list[Future[None]]) -> None:
        """Blocks first to last, the latter excluded, to the beginning of some memory."""
        size = self.block_bytes
        if self._last[:2] == (part, first):
            held = self._last[2]
            room[: len(held)] = held
            self._last = (part, first, room[: len(held)])
            room, first = room[len(held) :], first + 1
        if first == last:
            return
        room = room[: min(last * size, self._sizes[part]) - first * size]
        try:
            found = self._source.read_into(part, first * size, room)
        except FileNotFoundError as error:
            raise PartDamaged(f"{part} is missing, and the manifest says {self._sizes[part]:,} bytes") from error
        if found < len(room):
            raise PartDamaged(
                f"{part} ends at byte {first * size + found:,}, and the manifest says {self._sizes[part]:,}"
            )
        checks.append(self._checker.submit(self._check, part, first, room))
        self._last = (part, last - 1, room[(last - first - 1) * size :])
        self.tally.read += len(room)
        self.tally.blocks += last - first

    def _check(self, part: str, first: int, run: memoryview) -> None:
        """Hold blocks, from the first on, against their checksums."""
        for number, data in enumerate(cut_blocks(run, self.block_bytes), first):
            if not agrees(data, number, self._checksums[part]):
                begin = number * self.block_bytes
                raise PartDamaged(f"{part} is damaged between bytes {begin:,} and {begin + len(data):,}: "
                                  "they do not agree with their checksum")  # fmt: skip
