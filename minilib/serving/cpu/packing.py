"""A model made ready for serving on a CPU: its matrices packed, and each operation between two products one pass.

torch's own `nn.Linear` hands fp32 weights to the BLAS as they are, which is slow for a few rows, and each small
operation is several calls, which cost more than their work where a step has one row.

A packed matrix takes the place of the plain one, so that weights are in memory once and no copy can grow stale; an
embedding table that is the output projection, too, is packed once for both. What a row gets depends on that row alone,
to the last bit, however many rows are multiplied together.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.serving.cpu.machine_code import WIDTH
from minilib.serving.cpu.ops import CompiledOps
from minilib.serving.cpu.tape import Kernel, room, run

Model = TypeVar("Model", bound=nn.Module)


class PackedModel(RuntimeError):
    """What was asked needs plain weights, and these are packed."""


class _Moved(nn.Module):
    """A layer that took its parameters over in another form: it computes, and does nothing else."""

    def _apply(self, fn, recurse=True):
        like = torch.empty(0)
        there = fn(like)
        if (there.dtype, there.device) != (like.dtype, like.device):
            raise PackedModel(
                f"packed weights cannot go to {there.dtype} on {there.device}; move the model, then pack it"
            )
        return self

    def _save_to_state_dict(self, *args):
        raise PackedModel("packed weights have no plain form to save; save the model before it is packed")


class PackedMatrix:
    """A matrix (N, K) in panels, in the order in which products read it.

    Args:
        weight: fp32, on the CPU.

    Attributes:
        panels: (⌈N / WIDTH⌉, K, WIDTH), filled up with zeros.
    """

    def __init__(self, weight: Tensor) -> None:
        self.outputs, self.depth = weight.shape
        self.panels = torch.zeros(ceil_div(self.outputs, WIDTH), self.depth, WIDTH)
        whole = self.outputs // WIDTH
        self.panels[:whole] = weight[: whole * WIDTH].view(whole, WIDTH, self.depth).transpose(1, 2)
        if self.outputs % WIDTH:
            self.panels[whole, :, : self.outputs % WIDTH] = weight[whole * WIDTH :].T
        self._where = (self.panels.data_ptr(), len(self.panels))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (rows, K) → x · weightᵀ + bias, (rows, N); bias has a number for each column of the panels."""
        x = x if x.stride(1) == 1 else x.contiguous()
        panels, number = self._where
        y = room(len(x), number * WIDTH)
        address = 0 if bias is None else bias.data_ptr()
        of_x = (len(x), x.data_ptr(), x.stride(0))
        run(Kernel.PRODUCT, *of_x, panels, number, address, y.data_ptr(), number * WIDTH, self.depth)
        return y if self.outputs == number * WIDTH else y[:, : self.outputs]

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows of the matrix with these numbers, (len(numbers), K), as an embedding looks them up."""
        return self.panels[numbers // WIDTH, :, numbers % WIDTH]


class PackedLinear(_Moved):
    """A linear layer, for inference only: (..., K) → (..., N).

    Args:
        matrix: its weight.
        bias: (N,), or None.
    """

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, None
        if bias is not None:
            self.bias = torch.zeros(len(matrix.panels) * WIDTH)
            self.bias[: matrix.outputs] = bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.matrix.product(x, self.bias)
        return self.matrix.product(x.flatten(0, -2), self.bias).view(*x.shape[:-1], -1)


class PackedEmbedding(_Moved):
    """An embedding table that is packed for the output projection: (...) int64 → (..., K)."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.matrix.rows(token_ids.flatten()).view(*token_ids.shape, -1)


def pack(model: Model) -> Model:
    """Move a decoder's matrices into packed form, in place, and let compiled operations compute: fp32 on a CPU.

    From then on the model computes and does nothing else: whoever still holds a parameter that was moved, such as an
    optimizer, holds an empty tensor. Another dtype or device stays as it is, and packing once more changes nothing.

    Returns:
        The model.

    Cost: at any time one matrix more than the weights in memory.
    """
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return model
    matrices: dict[nn.Parameter, PackedMatrix] = {}
    modules = list(model.modules())
    products = {child.weight for module in modules for child in module.children() if isinstance(child, nn.Linear)}
    for module in modules:
        if hasattr(module, "ops"):
            module.ops = CompiledOps()
        for name, child in module.named_children():
            if isinstance(child, nn.Linear | nn.Embedding) and child.weight in products:
                weight = child.weight
                if weight not in matrices:
                    matrices[weight] = PackedMatrix(weight)
                    weight.data = weight.data.new_empty(0)  # freed for everybody who holds it
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(matrices[weight], child.bias))
                else:
                    setattr(module, name, PackedEmbedding(matrices[weight]))
    return model
