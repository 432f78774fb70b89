"""Softmax over the last dimension, forward and backward: each row is read once and written once.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", for rows that fit no register file.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import DTYPES, as_rows, check_floats, jit, launch, runs_kernel, triton
from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

ONE_PASS = 16384  # widest row that a program keeps in registers: 32 fp32 values a thread with 16 warps
TILE = 4096  # values that a program of narrow rows takes at a time


def reference(x: Tensor) -> Tensor:
    """`softmax` in plain torch, computed in fp32 (fp64 stays fp64): the oracle, and what runs where there is no GPU."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1).to(x.dtype)


def softmax(x: Tensor, interpret: bool = False) -> Tensor:
    """exp(x - max) / Σ exp(x - max) over the last dimension.

    A Triton kernel on a GPU, elsewhere `reference`. Differentiable once. A row of -inf gives NaN, as torch's does.

    Args:
        x: (..., columns) fp32, fp16 or bf16.
        interpret: run the kernel in Triton's interpreter, on the CPU.

    Returns:
        Contiguous, x's shape and dtype.

    Raises:
        TypeError: for another dtype.
        ValueError: for a tensor without dimensions, or if the interpreter is not on.

    Cost: see `cost`. Source: see above.
    """
    check_floats("softmax", x=x)
    if not x.dim():
        raise ValueError("softmax is taken over the last dimension, and x has none: give it one with .unsqueeze(0)")
    return _Softmax.apply(x, interpret) if runs_kernel(x, interpret) else reference(x)


def cost(rows: int, columns: int, dtype: str = "bf16") -> Cost:
    """5 FLOPs a value (max, −, exp, Σ, ÷); each is read once and written once."""
    size = BYTES[dtype]
    return Cost(flops=5 * rows * columns, bytes=2 * size * rows * columns, calls=1, dtype="fp32")


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, interpret: bool) -> Tensor:
        rows = as_rows(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            _launch(forward, rows, out, *rows.shape, rows.stride(0))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        rows = as_rows(grad)
        dx = torch.empty_like(out)
        if out.numel():
            _launch(backward, rows, out, dx, *rows.shape, rows.stride(0))
        return dx, None


@jit
def forward(
    x_ptr, out_ptr, num_rows, columns, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_PASS: tl.constexpr
):  # fmt: skip
    """Softmax of BLOCK_M rows; with ONE_PASS they fit BLOCK_N columns, else they are read twice, block by block."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    # A tensor may hold more than 2³¹ values: 64-bit addresses.
    x_row, out_row = x_ptr + row.to(tl.int64) * stride_x, out_ptr + row.to(tl.int64) * columns
    if ONE_PASS:
        there = (row < num_rows)[:, None] & (column < columns)[None, :]
        x = tl.load(x_row[:, None] + column, mask=there, other=-float("inf")).to(tl.float32)
        top = tl.where(row < num_rows, tl.max(x, 1), 0.0)  # rows beyond the last one: -inf - -inf is NaN
        weights = tl.exp(x - top[:, None])
        total = tl.where(row < num_rows, tl.sum(weights, 1), 1.0)
        tl.store(out_row[:, None] + column, weights / total[:, None], mask=there)
    else:
        top, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, columns, BLOCK_N):
            there = (row < num_rows)[:, None] & (begin + column < columns)[None, :]
            x = tl.load(x_row[:, None] + begin + column, mask=there, other=-float("inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far: -inf - -inf is NaN
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            top = new_top
        for begin in range(0, columns, BLOCK_N):
            there = (row < num_rows)[:, None] & (begin + column < columns)[None, :]
            x = tl.load(x_row[:, None] + begin + column, mask=there, other=-float("inf")).to(tl.float32)
            tl.store(out_row[:, None] + begin + column, tl.exp(x - top[:, None]) / total[:, None], mask=there)


@jit
def backward(
    grad_ptr, out_ptr, dx_ptr, num_rows, columns, stride_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """dx = y · (dy − Σ dy·y) for BLOCK_M rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    grad_row, flat = grad_ptr + row.to(tl.int64) * stride_grad, row.to(tl.int64) * columns
    if ONE_PASS:
        there = (row < num_rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_row[:, None] + column, mask=there, other=0.0).to(tl.float32)
        out = tl.load(out_ptr + flat[:, None] + column, mask=there, other=0.0).to(tl.float32)
        tl.store(dx_ptr + flat[:, None] + column, out * (grad - tl.sum(grad * out, 1)[:, None]), mask=there)
    else:
        total = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, columns, BLOCK_N):
            there = (row < num_rows)[:, None] & (begin + column < columns)[None, :]
            grad = tl.load(grad_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
            out = tl.load(out_ptr + flat[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(grad * out, 1)
        for begin in range(0, columns, BLOCK_N):
            there = (row < num_rows)[:, None] & (begin + column < columns)[None, :]
            grad = tl.load(grad_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
            out = tl.load(out_ptr + flat[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
            tl.store(dx_ptr + flat[:, None] + begin + column, out * (grad - total[:, None]), mask=there)


def choose_tile(columns: int) -> dict[str, int | bool]:
    """BLOCK_M, BLOCK_N, ONE_PASS and num_warps for rows of this width: about 16 bytes in flight a thread and load."""
    width = max(16, next_power_of_two(columns))
    one_pass = width <= ONE_PASS
    width = width if one_pass else TILE
    warps = min(16, max(4, width // 1024))
    return {"BLOCK_M": max(1, TILE // 2 // width), "BLOCK_N": width, "ONE_PASS": one_pass, "num_warps": warps}


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: both kernels, for narrow rows, for wide ones and for those read in blocks."""
    found = []
    widths = (*(16 << i for i in range(11)), 1000, 50_257, 100_000) if every else (128, 16384, 100_000)
    for dtype, columns in itertools.product(DTYPES.values(), widths):
        types = dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr", "dx_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("num_rows", "columns", "stride_x", "stride_grad"), "i32")
        unaligned = ("stride_x", "stride_grad") if columns % 16 else ()
        for kernel, name in ((forward, "forward"), (backward, "backward")):
            what = f"{name}, {dtype}, {columns} columns"
            found.append(Build.of(kernel, what, types, choose_tile(columns), unaligned=unaligned))
    return found


def _launch(kernel, *arguments) -> None:
    *_, rows, columns, _ = arguments
    tile = choose_tile(columns)
    launch(kernel, ceil_div(rows, tile["BLOCK_M"]), *arguments, **tile)
