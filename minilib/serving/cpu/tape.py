"""Calls of compiled kernels, made once in Python, recorded, and made again without Python.

A decode step of a small model is a hundred kernels, many of a few microseconds, and Python takes as long to call one as
one takes. But while as many sequences decode, nothing about these calls changes from step to step: the same kernels,
addresses and sizes; only what stands at the addresses is new. So the calls are a list, and a compiled loop makes them.
GPUs have the same problem and the same answer: CUDA graphs.

A tape is only true if everything that computes is on it. While one is recorded, an operation of torch that computes
makes it void: `Tape.complete` is False, and its owner goes on without.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from numba import njit, types
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilib.serving.cpu import attention_kernels, row_kernels
from minilib.serving.cpu.machine_code import OPTIONS

_GAP = 16  # numbers between rows: a power of two apart, all rows would compete for the same places of the L1 cache
_LONGEST = 16  # numbers of a call on a tape


class Kernel(IntEnum):
    """What can be on a tape."""

    PRODUCT = 0
    RMS_NORM = 1
    ROTATE = 2
    SWIGLU = 3
    ADD = 4
    STORE = 5
    ATTEND = 6


_KERNELS = (
    row_kernels.product, row_kernels.rms_norm, row_kernels.rotate, row_kernels.swiglu, row_kernels.add,
    attention_kernels.store, attention_kernels.attend,
)  # fmt: skip
product, rms_norm, rotate, swiglu, add, store, attend = _KERNELS


@njit(types.void(types.int64[:, ::1], types.float32[::1]), **OPTIONS)
def _replay(calls, numbers):
    for i in range(len(calls)):
        a, number = calls[i], numbers[i]
        if a[0] == 0:
            product(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9])
        elif a[0] == 1:
            rms_norm(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], number)
        elif a[0] == 2:
            rotate(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9])
        elif a[0] == 3:
            swiglu(a[1], a[2], a[3], a[4], a[5], a[6])
        elif a[0] == 4:
            add(a[1], a[2], a[3], a[4], a[5])
        elif a[0] == 5:
            store(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11])
        elif a[0] == 6:
            attend(
                a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], number
            )  # fmt: skip


class Tape:
    """Calls in their order.

    Attributes:
        complete: whether nothing but these calls computed while they were recorded.
    """

    def __init__(self) -> None:
        self.complete = True
        self._calls: list[tuple[tuple[int, ...], float]] = []
        self._rooms: list[Tensor] = []  # what the calls write to stays
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def append(self, kernel: Kernel, arguments: tuple[int, ...], number: float) -> None:
        self._calls.append(((kernel, *arguments), number))

    def keep(self, room: Tensor) -> None:
        self._rooms.append(room)

    def replay(self) -> None:
        """Make all calls again."""
        if self._arrays is None:
            calls = np.zeros((len(self._calls), _LONGEST), dtype=np.int64)
            for row, (call, _) in zip(calls, self._calls, strict=True):
                row[: len(call)] = call
            self._arrays = calls, np.array([number for _, number in self._calls], dtype=np.float32)
        _replay(*self._arrays)


class _Recorder(threading.local):
    tape: Tape | None = None


_recorder = _Recorder()


def run(kernel: Kernel, *arguments: int, number: float | None = None) -> None:
    """Call a kernel, and write the call down if this thread records."""
    if number is None:
        _KERNELS[kernel](*arguments)
    else:
        _KERNELS[kernel](*arguments, number)
    if _recorder.tape is not None:
        _recorder.tape.append(kernel, arguments, number or 0.0)


def room(rows: int, *row: int) -> Tensor:
    """An empty tensor (rows, *row) in fp32, which stays as long as the tape does."""
    made = torch.empty(rows, *row)
    if _recorder.tape is not None:
        _recorder.tape.keep(made)
    return made


def room_for_product(rows: int, *row: int) -> Tensor:
    """The same, its rows as far apart as the product that reads them likes."""
    if rows == 1:
        return room(rows, *row)
    width = int(np.prod(row))
    return room(rows, width + _GAP)[:, :width].view(rows, *row)


class _Watch(TorchDispatchMode):
    """Finds what computes: all but empty tensors and other views of a tensor that is there."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is not torch.ops.aten.empty:
            views = not function._schema.is_mutable and _memory_of(result) <= _memory_of(args) - {None}
            self.tape.complete = self.tape.complete and views
        return result


def _memory_of(values: object) -> set[int | None]:
    """Where the tensors among some values are; None stands for a number that was read from one."""
    leaves = tree_leaves(values)
    return {leaf.untyped_storage().data_ptr() if isinstance(leaf, Tensor) else None for leaf in leaves}


@contextmanager
def recording():
    """Write down, on the tape that this gives, what this thread runs."""
    tape = _recorder.tape = Tape()
    try:
        with _Watch(tape):
            yield tape
    finally:
        _recorder.tape = None
