"""Calls of compiled kernels, made once in Python, recorded, and made again without Python.

A decode step of a small model is a hundred kernels, many of a few microseconds, and Python takes as long to call one as
one takes. But while as many sequences decode, nothing about these calls changes from step to step: the same kernels,
addresses and sizes; only what stands at the addresses is new. So the calls are a list, and a compiled loop makes them.
GPUs have the same problem and the same answer: CUDA graphs.

A tape is only true if everything that computes is on it: an operation of torch between two kernels would be missing. So
dense decoders alone are recorded (steps.py), and the tests watch torch while that happens.
"""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from numba import types
from torch import Tensor

from minilib.serving.cpu.attention_kernels import attend_to_pages, store_in_slots
from minilib.serving.cpu.machine_code import kernel
from minilib.serving.cpu.row_kernels import (
    rows_add,
    rows_product,
    rows_rms_norm,
    rows_rotate,
    rows_round,
    rows_swiglu,
)

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
    ROUND = 7


_KERNELS = (
    rows_product, rows_rms_norm, rows_rotate, rows_swiglu, rows_add, store_in_slots, attend_to_pages, rows_round,
)  # fmt: skip


@kernel(types.void(types.int64[:, ::1], types.float32[::1]), parallel=False)
def _replay(calls, numbers):
    for i in range(len(calls)):
        a, number = calls[i], numbers[i]
        if a[0] == Kernel.PRODUCT:
            rows_product(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10])
        elif a[0] == Kernel.RMS_NORM:
            rows_rms_norm(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], number)
        elif a[0] == Kernel.ROTATE:
            rows_rotate(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9])
        elif a[0] == Kernel.SWIGLU:
            rows_swiglu(a[1], a[2], a[3], a[4], a[5], a[6])
        elif a[0] == Kernel.ADD:
            rows_add(a[1], a[2], a[3], a[4], a[5], a[6], a[7])
        elif a[0] == Kernel.STORE:
            store_in_slots(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11])
        elif a[0] == Kernel.ATTEND:
            attend_to_pages(
                a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], number
            )  # fmt: skip
        elif a[0] == Kernel.ROUND:
            rows_round(a[1], a[2], a[3], a[4], a[5], a[6])


class Tape:
    """Calls in their order."""

    def __init__(self) -> None:
        self._calls: list[tuple[tuple[int, ...], float]] = []
        self._tensors: list[Tensor] = []  # at whose addresses the calls read and write
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def append(self, called: Kernel, arguments: tuple[int, ...], number: float) -> None:
        self._calls.append(((called, *arguments), number))

    def keep(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)

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


def call_kernel(which: Kernel, *arguments: int, number: float | None = None) -> None:
    """Call a kernel, and write the call down if this thread records."""
    if number is None:
        _KERNELS[which](*arguments)
    else:
        _KERNELS[which](*arguments, number)
    if _recorder.tape is not None:
        _recorder.tape.append(which, arguments, number or 0.0)


def address(tensor: Tensor) -> int:
    """Where a tensor is; it stays there as long as a tape that is recorded now."""
    if _recorder.tape is not None:
        _recorder.tape.keep(tensor)
    return tensor.data_ptr()


def room(*shape: int) -> Tensor:
    """An empty tensor in fp32, whatever torch's default is."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def room_for_product(rows: int, *row: int) -> Tensor:
    """Room for (rows, *row), its rows as far apart as the product that reads them likes."""
    if rows == 1:
        return room(rows, *row)
    width = math.prod(row)
    return room(rows, width + _GAP)[:, :width].view(rows, *row)


@contextmanager
def recording():
    """Write down, on the tape that this gives, what this thread runs."""
    tape = _recorder.tape = Tape()
    try:
        yield tape
    finally:
        _recorder.tape = None
