"""A model made ready for serving on a CPU: its matrices packed, and each operation between two products one pass.

torch's own `nn.Linear` hands fp32 weights to the BLAS as they are, which is slow for a few rows, and each small
operation is several calls, which cost more than their work where a step has one row.

A packed matrix takes the place of the plain one, so that weights are in memory once and no copy can grow stale; an
embedding table that is the output projection, too, is packed once for both. What a row gets depends on that row alone,
to the last bit, however many rows are multiplied together.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TypeVar

import torch
from torch import Tensor, nn

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.serving.cpu.machine_code import BF16_PAIRS, FP32, HAS_AMX, MULTIPLIES_PAIRS, WIDTH
from minilib.serving.cpu.ops import CompiledOps, PackedModel
from minilib.serving.cpu.tape import Kernel, address, call_kernel, room, room_for_product

Model = TypeVar("Model", bound=nn.Module)
_FEW_ROWS = 32  # what oneDNN chooses the order of a weight for
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h


class _Moved(nn.Module):
    """A layer that took its parameters over in another form: it computes, and does nothing else."""

    def _apply(self, fn, recurse=True):
        CompiledOps().check_move(fn)
        return self

    def _save_to_state_dict(self, *args):
        raise PackedModel("packed weights have no plain form to save; save the model before it is packed")

    def _load_from_state_dict(self, *args):
        raise PackedModel("packed weights cannot be loaded over; load the weights, then pack the model")


class PackedMatrix:
    """A matrix (N, K) in panels, in the order in which products read it.

    Args:
        weight: fp32, on the CPU.
        over: write the panels over the weight, where they take as much memory as it: nobody else may hold it.
        dtype: torch.bfloat16 to round it and the rows that it is multiplied with; sums stay in fp32.

    Attributes:
        panels: (⌈N / WIDTH⌉, K, WIDTH, 1) in fp32 or (⌈N / WIDTH⌉, ⌈K / 2⌉, WIDTH, 2) in bf16, filled up with zeros.

    Raises:
        ValueError: for bf16 on a CPU without AVX512-BF16.
    """

    def __init__(self, weight: Tensor, over: bool = False, dtype: torch.dtype = torch.float32) -> None:
        if dtype == torch.bfloat16 and not MULTIPLIES_PAIRS:
            raise ValueError("this CPU has no AVX512-BF16; pack the matrix in torch.float32")
        self.outputs, self.depth = weight.shape
        side_by_side = 4 // dtype.itemsize
        shape = (ceil_div(self.outputs, WIDTH), ceil_div(self.depth, side_by_side), WIDTH, side_by_side)
        over = over and dtype == weight.dtype and self.outputs % WIDTH == 0 and weight.is_contiguous()
        self.panels = weight.view(shape) if over else torch.zeros(shape, dtype=dtype)
        for panel, rows in zip(self.panels, weight.split(WIDTH), strict=True):  # a panel lies where its rows lay
            rows = nn.functional.pad(rows.to(dtype, copy=True), (0, -self.depth % side_by_side))
            panel[:, : len(rows)] = rows.unflatten(1, (-1, side_by_side)).transpose(0, 1)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (rows, K) → x · weightᵀ + bias, (rows, N); bias has a number for each column of the panels."""
        if x.shape[1] != self.depth or x.dtype != torch.float32:
            raise ValueError(f"rows of {self.depth} fp32 numbers expected, got {tuple(x.shape)} in {x.dtype}")
        x, held = x if x.stride(1) == 1 else x.contiguous(), FP32
        if self.panels.dtype == torch.bfloat16:
            x, held = in_pairs(x), BF16_PAIRS
        number, depth = self.panels.shape[:2]
        y = room(len(x), number * WIDTH)
        of_bias = 0 if bias is None else address(bias)
        of_x = (len(x), address(x), x.stride(0))
        call_kernel(
            Kernel.PRODUCT, held, *of_x, address(self.panels), number, of_bias, address(y), number * WIDTH, depth
        )
        return y if self.outputs == number * WIDTH else y[:, : self.outputs]

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows of the matrix with these numbers, (len(numbers), K), as an embedding looks them up."""
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.outputs):
            raise IndexError(f"rows 0 … {self.outputs - 1} are there, got {numbers.tolist()}")
        return self.panels[numbers // WIDTH, :, numbers % WIDTH].flatten(1)[:, : self.depth]


def in_pairs(x: Tensor) -> Tensor:
    """Rows rounded to bf16, two numbers in the place of one in fp32."""
    pairs = room_for_product(len(x), ceil_div(x.shape[1], 2))
    call_kernel(Kernel.ROUND, *x.shape, address(x), x.stride(0), address(pairs), pairs.stride(0))
    return pairs


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
            self.bias = torch.zeros(len(matrix.panels) * WIDTH, dtype=torch.float32)
            self.bias[: matrix.outputs] = bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.matrix.product(x, self.bias)
        return self.matrix.product(x.flatten(0, -2), self.bias).view(*x.shape[:-1], -1)


class RoundedLinear(_Moved):
    """A linear layer in bf16 that oneDNN multiplies, for inference only: (..., K) → (..., N) in fp32.

    oneDNN takes the instructions that a CPU has for that, AMX above all. Other than in a PackedLinear of bf16 the
    bias is rounded, too, and no tape records the product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), _FEW_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.matrix, self.bias, "none", [], "").float()


class PackedEmbedding(_Moved):
    """An embedding table that is packed for the output projection: (...) int64 → (..., K)."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.matrix.rows(token_ids.flatten()).view(*token_ids.shape, -1)


def pack(model: Model, products: torch.dtype = torch.float32, over: bool = False) -> Model:
    """Move a decoder's matrices into packed form, in place, and let compiled operations compute: fp32 on a CPU.

    From then on the model computes and does nothing else: whoever still holds a parameter that was moved, such as an
    optimizer, holds an empty tensor. Another dtype or device stays as it is, and packing once more changes nothing.

    Args:
        model: a decoder.
        products: torch.bfloat16 to multiply in bf16, but for the logits: half the bytes are read, and a number of a
            product is off by about 2⁻⁸ of its size, that is in the third digit. All else stays in fp32.
        over: write packed weights over the plain ones, which nobody else may hold then, not even as a state_dict.

    Returns:
        The model.

    Raises:
        ValueError: for products in another dtype, or in bf16 on a CPU that is not made for it.

    Cost: at any time one matrix more than the weights in memory; no more, if panels in fp32 may be written over them.
    """
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return model
    _check(products)
    matrices: dict[nn.Parameter, PackedMatrix] = {}
    modules, unembed = list(model.modules()), getattr(model, "unembed", None)
    multiplied = {child.weight for module in modules for child in module.children() if isinstance(child, nn.Linear)}
    for module in modules:
        if hasattr(module, "ops"):
            module.ops = CompiledOps()
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear | nn.Embedding) or child.weight not in multiplied:
                continue
            weight = child.weight
            rounded = products == torch.bfloat16 and isinstance(child, nn.Linear) and child is not unembed
            if rounded and not bf16_by_own_block():
                setattr(module, name, RoundedLinear(child))
            else:
                if weight not in matrices:
                    matrices[weight] = PackedMatrix(weight.detach(), over, products if rounded else torch.float32)
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(matrices[weight], child.bias))
                else:
                    setattr(module, name, PackedEmbedding(matrices[weight]))
            weight.data = weight.data.new_empty(0)  # freed for everybody who holds it
    _keep_freed_memory()
    return model


def bf16_by_own_block() -> bool:
    """Whether packed matrices in bf16 are the fast ones on this CPU: with AMX oneDNN's are."""
    return MULTIPLIES_PAIRS and not HAS_AMX


def _check(products: torch.dtype) -> None:
    if products not in (torch.float32, torch.bfloat16):
        raise ValueError(f"products are in torch.float32 or torch.bfloat16, got {products!r}")
    supported = bf16_by_own_block() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if products == torch.bfloat16 and not supported:
        raise ValueError("this CPU has neither AMX nor AVX512-BF16; products in bf16 would be slow, take torch.float32")


def _keep_freed_memory() -> None:
    """Let the C library reuse what a layer frees for the next one, for the rest of this process.

    By default glibc gives large blocks back to the system, and each prompt takes thousands of page faults anew.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_TRIM_THRESHOLD, 2**30)
