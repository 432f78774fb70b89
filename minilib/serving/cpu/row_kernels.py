"""What a decoder does with its rows: products, and in one pass each norms, rotations, SwiGLU and sums.

Kernels take addresses, rows and strides, as those on a GPU do; ops.py and packing.py call them with tensors. In plain
torch a norm or a rotation is four to eight calls that read and write memory; for one row the calls cost more than the
work.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, prange, types

from minilib.serving.cpu.machine_code import BF16_PAIRS, FP32, WIDTH, kernel, pointer, rows_times_panel

LEAST, MOST = np.float32(-87.0), np.float32(88.0)  # where exp leaves the numbers that fp32 has at full precision
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1 / math.log(2)), np.float32(0.693359375), np.float32(-2.12194440e-4)
ONE = np.float32(1)


@njit(inline="always")
def exp(x):
    """e^x in fp32 to 4 units in the last place, 0 below -87; written out so that LLVM takes many numbers at a time.

    2^n · e^r with |r| ≤ ln 2 / 2, the second by its series.
    """
    n = np.floor(min(max(x, LEAST), MOST) * LOG2_E + np.float32(0.5))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    series = np.float32(1 / 720)
    for factorial in (120, 24, 6, 2, 1):
        series = series * r + np.float32(1 / factorial)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (series * r + ONE) * power if x >= LEAST else (x if x != x else np.float32(0))


@njit(inline="always")
def numbers_at(address, place, count):
    """So many fp32 numbers, from this place on; counted from 0, so that loops over them take many at a time."""
    return carray(pointer(address + 4 * place), (count,), np.float32)


@kernel(types.void(*[types.int64] * 10))
def rows_product(held, rows, x, x_stride, panels, num_panels, bias, y, y_stride, depth):
    """y = x · matrixᵀ + bias (num_panels · WIDTH numbers, or address 0); cores share out the panels.

    x and panels hold FP32 or BF16_PAIRS; x_stride and depth count units of 32 bits.
    """
    ys = carray(pointer(y), (rows, y_stride), np.float32)
    biases = numbers_at(bias, 0, num_panels * WIDTH)
    for number in prange(num_panels):
        first = np.int64(number) * WIDTH
        panel, to = panels + 4 * first * depth, y + 4 * first
        if held == BF16_PAIRS:
            rows_times_panel(BF16_PAIRS, rows, x, x_stride, panel, to, y_stride, depth)
        else:
            rows_times_panel(FP32, rows, x, x_stride, panel, to, y_stride, depth)
        if bias:
            for row in range(rows):
                for column in range(first, first + WIDTH):
                    ys[row, column] += biases[column]


@njit(inline="always")
def to_bf16(bits):
    """fp32 to the nearest bf16, of two to the even one, both as their bits; NaN stays NaN."""
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(odd + np.uint32(0x7FFF))) >> np.uint32(16))
    return np.uint16(0x7FC0 if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@kernel(types.void(*[types.int64] * 6))
def rows_round(rows, width, x, x_stride, y, y_stride):
    """y = x as BF16_PAIRS, the last filled up with 0; y_stride counts pairs."""
    for row in prange(rows):
        at = np.int64(row)
        xs = carray(pointer(x + 4 * at * x_stride), (width,), np.uint32)
        ys = carray(pointer(y + 4 * at * y_stride), (width + width % 2,), np.uint16)
        for i in range(width):
            ys[i] = to_bf16(xs[i])
        for i in range(width, len(ys)):  # at most one: an assignment in no loop Numba would drop, see rows_add
            ys[i] = 0


@kernel(types.void(*[types.int64] * 11, types.float32))
def rows_rms_norm(rows, parts, width, x, x_stride, residual, residual_stride, total, weight, y, y_stride, eps):
    """Each of the parts of a row, so many numbers wide, by itself; with a residual that of total = residual + x."""
    weights = numbers_at(weight, 0, width)
    for number in prange(rows * parts):
        row, part = divmod(np.int64(number), parts)
        xs = numbers_at(x, row * x_stride + part * width, width)
        ys = numbers_at(y, row * y_stride + part * width, width)
        squares = np.float32(0)
        if residual:
            others = numbers_at(residual, row * residual_stride + part * width, width)
            totals = numbers_at(total, (row * parts + part) * width, width)
            for i in range(width):
                totals[i] = xs[i] + others[i]
            xs = totals
        for i in range(width):
            squares += xs[i] * xs[i]
        scale = ONE / np.sqrt(squares / np.float32(width) + eps)
        for i in range(width):
            ys[i] = xs[i] * scale * weights[i]


@kernel(types.void(*[types.int64] * 9))
def rows_rotate(tokens, heads, head_dim, x, x_stride, cos, sin, y, y_stride):
    half = head_dim // 2
    for token in prange(tokens):
        at = np.int64(token)
        cosines, sines = numbers_at(cos, at * head_dim, head_dim), numbers_at(sin, at * head_dim, head_dim)
        for head in range(heads):
            xs = numbers_at(x, at * x_stride + head * head_dim, head_dim)
            ys = numbers_at(y, at * y_stride + head * head_dim, head_dim)
            for i in range(half):
                ys[i] = xs[i] * cosines[i] + xs[half + i] * sines[i]
                ys[half + i] = xs[half + i] * cosines[half + i] + xs[i] * sines[half + i]


@kernel(types.void(*[types.int64] * 6))
def rows_swiglu(rows, width, x, x_stride, y, y_stride):
    for row in prange(rows):
        at = np.int64(row)
        gates, ups = numbers_at(x, at * x_stride, width), numbers_at(x, at * x_stride + width, width)
        ys = numbers_at(y, at * y_stride, width)
        for i in range(width):
            ys[i] = gates[i] / (ONE + exp(-gates[i])) * ups[i]


@kernel(types.void(*[types.int64] * 7))
def rows_add(rows, width, x, x_stride, y, y_stride, z):
    """z = x + y. (Were z[i] assigned to in the prange itself, Numba would see nobody read z, and drop the loop.)"""
    for row in prange(rows):
        at = np.int64(row)
        xs, ys = numbers_at(x, at * x_stride, width), numbers_at(y, at * y_stride, width)
        zs = numbers_at(z, at * width, width)
        for i in range(width):
            zs[i] = xs[i] + ys[i]
