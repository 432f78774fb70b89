"""SwiGLU, the gate of the feed-forward network: silu(gate) · up, forward and backward, out of one fused projection.

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import DTYPES, as_rows, check_floats, jit, launch, runs_kernel, triton
from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

TILE = 2048  # outputs of one program
WIDEST = 1024  # of which this many lie in one row at most


def reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain torch, computed in fp32 (fp64 stays fp64): the oracle, and what runs without a GPU."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor, interpret: bool = False) -> Tensor:
    """gate · sigmoid(gate) · up, of the two halves of the last dimension; rounded once.

    A Triton kernel on a GPU, elsewhere `reference`. Differentiable, once.

    Args:
        gate_up: (..., 2 · columns) fp32, fp16 or bf16; the gate comes first.
        interpret: run the kernel in Triton's interpreter, on the CPU.

    Returns:
        (..., columns), contiguous, gate_up's dtype.

    Raises:
        TypeError: for another dtype.
        ValueError: for a last dimension that has no halves, or if the interpreter is not on.

    Cost: see `cost`. Source: see above.
    """
    check_floats("swiglu", gate_up=gate_up)
    if not gate_up.dim() or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu wants (..., 2 · columns), gate and up side by side; got {tuple(gate_up.shape)}")
    return _SwiGLU.apply(gate_up, interpret) if runs_kernel(gate_up, interpret) else reference(gate_up)


def cost(rows: int, columns: int, dtype: str = "bf16") -> Cost:
    """5 FLOPs an output (exp, +, ÷, ·, ·); its gate and its up are read once, and it is written once."""
    size = BYTES[dtype]
    return Cost(flops=5 * rows * columns, bytes=3 * size * rows * columns, calls=1, dtype="fp32")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, interpret: bool) -> Tensor:
        rows = as_rows(gate_up)
        out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=rows.dtype, device=rows.device)
        if out.numel():
            _launch(forward, out.shape[-1], rows, out, len(rows), rows.stride(0))
        ctx.save_for_backward(rows)
        ctx.shape = gate_up.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        grads = as_rows(grad)
        out = torch.empty(ctx.shape, dtype=rows.dtype, device=rows.device)
        if out.numel():
            _launch(backward, grads.shape[-1], rows, grads, out, len(rows), rows.stride(0), grads.stride(0))
        return out, None


@jit
def read_halves(
    gate_up_ptr, num_rows, stride, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Row, column and mask of this program's BLOCK_M × BLOCK_N values, and gate and up there.

    Several programs share a row that is wider than BLOCK_N.
    """
    blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    there = (row < num_rows)[:, None] & (column < COLUMNS)
    # A tensor may hold more than 2³¹ values: 64-bit addresses.
    row = row.to(tl.int64)[:, None]
    gate_ptr = gate_up_ptr + row * stride + column
    gate = tl.load(gate_ptr, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + COLUMNS, mask=there, other=0.0).to(tl.float32)
    return row, column, there, gate, up


@jit
def forward(
    gate_up_ptr, out_ptr, num_rows, stride_gate_up, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """BLOCK_M × BLOCK_N outputs."""
    row, column, there, gate, up = read_halves(gate_up_ptr, num_rows, stride_gate_up, COLUMNS, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + row * COLUMNS + column, gate * tl.sigmoid(gate) * up, mask=there)


@jit
def backward(
    gate_up_ptr, grad_ptr, out_ptr, num_rows, stride_gate_up, stride_grad,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Both halves of the gradient: grad · up · σ · (1 + gate · (1 − σ)) and grad · gate · σ, with σ = sigmoid(gate)."""
    row, column, there, gate, up = read_halves(gate_up_ptr, num_rows, stride_gate_up, COLUMNS, BLOCK_M, BLOCK_N)
    out = out_ptr + row * (2 * COLUMNS) + column
    grad = tl.load(grad_ptr + row * stride_grad + column, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(out, grad * up * share * (1 + gate * (1 - share)), mask=there)
    tl.store(out + COLUMNS, grad * gate * share, mask=there)


def choose_tile(columns: int) -> dict[str, int]:
    """The kernels' constants and num_warps for rows of this many outputs: 16 outputs a thread."""
    width = min(WIDEST, next_power_of_two(columns))
    return {"COLUMNS": columns, "BLOCK_M": TILE // width, "BLOCK_N": width, "num_warps": 4}


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: both kernels, for rows of several blocks and for narrow ones."""
    chosen = ((forward, "bf16", 14336), (forward, "fp32", 64), (backward, "bf16", 14336), (backward, "fp16", 64))
    if every:
        widths = (64, 128, 256, 512, 768, 2048, 8192, 11008, 14336, 28672)
        chosen = itertools.product((forward, backward), DTYPES.values(), widths)
    found = []
    for kernel, dtype, columns in chosen:
        types = dict.fromkeys(("gate_up_ptr", "grad_ptr", "out_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("num_rows", "stride_gate_up", "stride_grad"), "i32")
        name = "forward" if kernel is forward else "backward"
        found.append(Build.of(kernel, f"{name}, {dtype}, {columns} columns", types, choose_tile(columns)))
    return found


def _launch(kernel, columns: int, *arguments) -> None:
    """Launch over all rows of the first argument; tensors come first, then num_rows and strides."""
    tile = choose_tile(columns)
    programs = ceil_div(len(arguments[0]), tile["BLOCK_M"]) * ceil_div(columns, tile["BLOCK_N"])
    launch(kernel, programs, *arguments, **tile)
