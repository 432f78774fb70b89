"""What a decoder does with its rows: products, and in one pass each norms, rotations, SwiGLU and sums.

Kernels take addresses, rows and strides, as those on a GPU do; ops.py and packing.py call them with tensors. In plain
torch a norm or a rotation is four to eight calls that read and write memory; for one row the calls cost more than the
work.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, prange, types

from minilib.serving.cpu.machine_code import OPTIONS, WIDTH, pointer, rows_times_panel

LEAST, MOST = np.float32(-87.0), np.float32(88.0)  # where exp leaves the numbers that fp32 has at full precision
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1 / math.log(2)), np.float32(0.693359375), np.float32(-2.12194440e-4)
ONE = np.float32(1)


@njit(inline="always")
def exp(x):
    """e^x in fp32 to 2 units in the last place, 0 below -87; written out so that LLVM takes many numbers at a time.

    2^n · e^r with |r| ≤ ln 2 / 2, the second by its series.
    """
    n = np.floor(min(max(x, LEAST), MOST) * LOG2_E + np.float32(0.5))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    series = np.float32(1 / 720)
    for factorial in (120, 24, 6, 2, 1):
        series = series * r + np.float32(1 / factorial)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (series * r + ONE) * power if x >= LEAST else (x if x != x else np.float32(0))


@njit(types.void(*[types.int64] * 9), parallel=True, **OPTIONS)
def rows_product(rows, x, x_stride, panels, num_panels, bias, y, y_stride, depth):
    """y = x · matrixᵀ + bias (num_panels · WIDTH numbers, or address 0); cores share out the panels."""
    ys = carray(pointer(y), (rows, y_stride), np.float32)
    biases = carray(pointer(bias), (num_panels * WIDTH,), np.float32)
    for number in prange(num_panels):
        first = np.int64(number) * WIDTH
        rows_times_panel(rows, x, x_stride, panels + 4 * first * depth, y + 4 * first, y_stride, depth)
        if bias:
            for row in range(rows):
                for column in range(first, first + WIDTH):
                    ys[row, column] += biases[column]


@njit(types.void(*[types.int64] * 11, types.float32), parallel=True, **OPTIONS)
def rows_rms_norm(rows, parts, width, x, x_stride, residual, residual_stride, total, weight, y, y_stride, eps):
    """Each of the parts of a row, so many numbers wide, by itself; with a residual that of total = residual + x."""
    xs, ys = carray(pointer(x), (rows, x_stride), np.float32), carray(pointer(y), (rows, y_stride), np.float32)
    residuals = carray(pointer(residual), (rows, residual_stride), np.float32)
    totals = carray(pointer(total), (rows, parts * width), np.float32)
    weights = carray(pointer(weight), (width,), np.float32)
    for row in prange(rows):
        for first in range(0, parts * width, width):
            squares = np.float32(0)
            if residual:
                for i in range(first, first + width):
                    h = xs[row, i] + residuals[row, i]
                    totals[row, i] = h
                    squares += h * h
            else:
                for i in range(first, first + width):
                    squares += xs[row, i] * xs[row, i]
            scale = ONE / np.sqrt(squares / np.float32(width) + eps)
            for i in range(width):
                h = totals[row, first + i] if residual else xs[row, first + i]
                ys[row, first + i] = h * scale * weights[i]


@njit(types.void(*[types.int64] * 9), parallel=True, **OPTIONS)
def rows_rotate(tokens, heads, head_dim, x, x_stride, cos, sin, y, y_stride):
    xs, ys = carray(pointer(x), (tokens, x_stride), np.float32), carray(pointer(y), (tokens, y_stride), np.float32)
    cosines = carray(pointer(cos), (tokens, head_dim), np.float32)
    sines = carray(pointer(sin), (tokens, head_dim), np.float32)
    half = head_dim // 2
    for token in prange(tokens):
        for head in range(heads):
            first = head * head_dim
            for i in range(half):
                a, b = xs[token, first + i], xs[token, first + half + i]
                ys[token, first + i] = a * cosines[token, i] + b * sines[token, i]
                ys[token, first + half + i] = b * cosines[token, half + i] + a * sines[token, half + i]


@njit(types.void(*[types.int64] * 6), parallel=True, **OPTIONS)
def rows_swiglu(rows, width, x, x_stride, y, y_stride):
    xs, ys = carray(pointer(x), (rows, x_stride), np.float32), carray(pointer(y), (rows, y_stride), np.float32)
    for row in prange(rows):
        for i in range(width):
            gate = xs[row, i]
            ys[row, i] = gate / (ONE + exp(-gate)) * xs[row, width + i]


@njit(types.void(*[types.int64] * 7), parallel=True, **OPTIONS)
def rows_add(rows, width, x, x_stride, y, y_stride, z):
    """z = x + y. (Were z[i] assigned to in the prange itself, Numba would see nobody read z, and drop the loop.)"""
    xs, ys = carray(pointer(x), (rows, x_stride), np.float32), carray(pointer(y), (rows, y_stride), np.float32)
    zs = carray(pointer(z), (rows, width), np.float32)
    for row in prange(rows):
        for i in range(width):
            zs[row, i] = xs[row, i] + ys[row, i]
