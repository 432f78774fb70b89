"""The table of a checkpoint: for every tensor its shape, its dtype, and which bytes of which part hold which box.

    model.layers.0.qkv.weight    float32 (96, 64)    rows 0 … 47 in part-…-00000 from byte 4096 on
                                                     rows 48 … 95 in part-…-00001 from byte 0 on

Nothing in it says how many ranks wrote, or in which mesh: whoever reads asks for boxes, and finds the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minilib.operations.checkpoint.format.boxes import Box, overlap


class StateMismatch(ValueError):
    """A state and a checkpoint, or the states of two ranks, do not fit together; the message says which tensor."""


class Fragment(NamedTuple):
    """A box of a tensor in the memory of a rank.

    Args:
        name: of the tensor.
        shape: of the whole tensor.
        box: which part of it.
        data: of the box's shape, in any memory layout; saved from here and loaded into here.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    data: Tensor


class HeldBox(NamedTuple):
    """What a rank holds or writes of a tensor.

    Args:
        name, dtype, shape: of the tensor; the dtype by name.
        box: the part of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.numel * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return dtype_of(self.dtype).itemsize


class StoredBox(NamedTuple):
    """A box of a tensor in a part, its elements in the order of rows.

    Args:
        box: which.
        part: name of the file.
        offset: bytes of the part in front of it.
    """

    box: Box
    part: str
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Args:
        dtype, shape: of the whole tensor.
        boxes: together every element once.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    def check_whole(self, name: str) -> None:
        """Raise StateMismatch unless the boxes hold every element once."""
        numel, held = Box.whole(self.shape).numel, sum(stored.box.numel for stored in self.boxes)
        outside = [stored.box for stored in self.boxes if not stored.box.fits(self.shape)]
        if outside:
            raise StateMismatch(f"{name}, {self.shape}: {outside[0]} is not within it")
        boxes = sorted(stored.box for stored in self.boxes if stored.box.numel)
        twice = next(
            (both for n, one in enumerate(boxes) for other in boxes[n + 1 :] if (both := overlap(one, other))), None
        )
        if twice or held != numel:
            said = f"{twice} is held twice, in boxes that differ" if twice else f"ranks hold {held} of {numel} elements"
            raise StateMismatch(f"{name}, {self.shape}: {said}; every element is in one box, whoever has copies of it")


Table = Mapping[str, StoredTensor]


def packed_table(table: Mapping[str, StoredTensor]) -> dict:
    """A table as JSON has it; parts are named once."""
    parts = sorted({stored.part for tensor in table.values() for stored in tensor.boxes})
    number = {part: n for n, part in enumerate(parts)}
    tensors = {
        name: [dtype_name(tensor.dtype), tensor.shape,
               [[box.start, box.shape, number[part], offset] for box, part, offset in tensor.boxes]]
        for name, tensor in table.items()
    }  # fmt: skip
    return {"parts": parts, "tensors": tensors}


def unpacked_table(said: Mapping) -> dict[str, StoredTensor]:
    """The inverse of `packed_table`.

    Raises:
        StateMismatch: if this torch lacks a dtype.
    """
    return {
        name: StoredTensor(
            dtype_of(dtype),
            tuple(shape),
            tuple(StoredBox(Box(tuple(a), tuple(b)), said["parts"][part], at) for a, b, part, at in boxes),
        )
        for name, (dtype, shape, boxes) in said["tensors"].items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateMismatch(f"the checkpoint holds values of dtype {name!r}, which torch {torch.__version__} has not")
    return dtype


def check_fits(fragments: Iterable[Fragment], table: Mapping[str, StoredTensor]) -> None:
    """Refuse a state that asks for what a checkpoint has not, or has otherwise.

    Raises:
        StateMismatch: for the first tensor that is missing, or of another shape or dtype.
    """
    for fragment in fragments:
        if fragment.name not in table:
            raise StateMismatch(f"{fragment.name} is missing in the checkpoint, which holds {len(table)} tensors: "
                                "it is of another model or optimizer")  # fmt: skip
        stored = table[fragment.name]
        if stored.shape != tuple(fragment.shape):
            raise StateMismatch(f"{fragment.name} is {tuple(fragment.shape)} here and {stored.shape} in the checkpoint")
        if stored.dtype != fragment.data.dtype:
            raise StateMismatch(f"{fragment.name} is {dtype_name(fragment.data.dtype)} here and "
                                f"{dtype_name(stored.dtype)} in the checkpoint; nothing is cast")  # fmt: skip
