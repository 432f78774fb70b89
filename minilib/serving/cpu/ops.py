"""The decoder's operations in compiled code: fp32 on a CPU, for inference, each row as if it were alone.

Rows are those of an engine: (tokens, width), or (tokens, heads, head_dim).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.model.ops import Ops
from minilib.serving.cpu.tape import Kernel, address, call_kernel, room, room_for_product


class PackedModel(RuntimeError):
    """What was asked needs plain weights, and these are packed."""


class CompiledOps(Ops):
    """One pass over the rows an operation; see `Ops`."""

    compiled = True

    def check_move(self, fn):
        there = fn(torch.empty(0, dtype=torch.float32, device="cpu"))
        if there.dtype != torch.float32 or there.device.type != "cpu":
            raise PackedModel(
                f"packed weights cannot go to {there.dtype} on {there.device}; move the model, then pack it"
            )

    def rms_norm(self, x, weight, residual, eps):
        x = _rows_as_wholes(x)
        rows, width, parts = len(x), x.shape[-1], x.shape[1] if x.dim() == 3 else 1
        y = room_for_product(*x.shape)
        h, of_residual, of_h = x, (0, 0), 0
        if residual is not None:
            residual, h = _rows_as_wholes(residual), room(*x.shape)
            of_residual, of_h = (address(residual), residual.stride(0)), address(h)
        of_x, of_y = (address(x), x.stride(0)), (address(y), y.stride(0))
        sizes = (rows, parts, width)
        call_kernel(Kernel.RMS_NORM, *sizes, *of_x, *of_residual, of_h, address(weight), *of_y, number=eps)
        return y if residual is None else (y, h)

    def rotary(self, x, rope):
        if x.dim() != 3:
            raise ValueError(f"a packed model computes flat tokens, (tokens,), got token ids {tuple(x.shape[:-2])}")
        x = _rows_as_wholes(x)
        tokens, heads, head_dim = x.shape
        y = room(tokens, heads, head_dim)
        angles = (address(angle) for angle in rope)
        call_kernel(
            Kernel.ROTATE, tokens, heads, head_dim, address(x), x.stride(0), *angles, address(y), heads * head_dim
        )
        return y

    def swiglu(self, gate_up):
        x = _rows_as_wholes(gate_up)
        rows, width = len(x), x.shape[1] // 2
        y = room_for_product(rows, width)
        call_kernel(Kernel.SWIGLU, rows, width, address(x), x.stride(0), address(y), y.stride(0))
        return y

    def add(self, x, y):
        x, y = _rows_as_wholes(x), _rows_as_wholes(y)
        z = room(*x.shape)
        of_both = (address(x), x.stride(0), address(y), y.stride(0))
        call_kernel(Kernel.ADD, *x.shape, *of_both, address(z))
        return z


def _rows_as_wholes(x: Tensor) -> Tensor:
    """A row (of heads) with its numbers side by side, whatever lies between rows; the rows of a decoder are so."""
    wholes = x.stride(-1) == 1 and (x.dim() == 2 or x.stride(-2) == x.shape[-1])
    return x if wholes else x.contiguous()
