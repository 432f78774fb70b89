"""A model made ready for decoding on a CPU, where a step multiplies few rows and is made of many small calls.

Its matrices are packed: put once into the order in which oneDNN's product reads them. torch's own `nn.Linear` hands
fp32 weights to the BLAS as they are, which is slow for a few rows, and for very few may be the faster way:

    25 million parameters, torch 2.13, 2 cores    1 row           8 rows         32 rows     plain / packed
    AMD EPYC                                                      15 / 4 ms
    Intel Xeon                                    2.2 / 2.9 ms    5.0 / 4.0 ms   9.1 / 7.7 ms

So how few is measured when a model is packed. `torch.compile` packs with the same two operations, but needs a C++
compiler on the reader's machine. Its norms are computed in four calls instead of the eight behind `F.rms_norm`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Model = TypeVar("Model", bound=nn.Module)

_ROWS = 32  # the batch that oneDNN chooses the order for; it was the best order, or as good as any, for 1 to 256 rows
_FEW_ROWS = (1, 2, 3, 4)  # with more, packed was faster on every CPU seen


class PackedLinear(nn.Module):
    """A linear layer over packed weights; for inference only.

    Args:
        linear: the layer to pack, fp32 on the CPU.

    Attributes:
        plain_rows: up to so many rows go to the plain weight instead.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.plain, self.bias = linear.weight.detach(), linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain, _ROWS)
        self.plain_rows = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= self.plain_rows * x.shape[-1]:
            return F.linear(x, self.plain, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FewCallsRMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, written as √d · weight · x / √(|x|² + d · eps); for inference only.

    Args:
        norm: whose weight and eps it takes.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        weight = norm.weight.detach()
        self.weight = weight * math.sqrt(len(weight))
        self.least = torch.tensor([math.sqrt(len(weight) * norm.eps)])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        h = x if residual is None else residual + x
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True).hypot_(self.least)
        y = torch.div(h, length).mul_(self.weight)
        return y if residual is None else (y, h)


def packed(model: Model) -> Model:
    """The same model made ready where that can be had (fp32 on a CPU with oneDNN), else the model itself.

    The model that was given stays as it is; embeddings are shared with it.

    Cost: the matrices once more in memory, and some products to measure which way is faster for 1 to 4 rows.
    """
    here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    parameters = list(model.parameters())
    if not here or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters):
        return model
    twin = copy.deepcopy(model, memo={id(tensor): tensor for tensor in (*parameters, *model.buffers())})
    layers = []
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                layers.append(PackedLinear(child))
                setattr(module, name, layers[-1])
            elif isinstance(child, nn.RMSNorm):
                setattr(module, name, FewCallsRMSNorm(child))
    plain_rows = _plain_rows(layers)
    for layer in layers:
        layer.plain_rows = plain_rows
    return twin


@torch.inference_mode()
def _plain_rows(layers: list[PackedLinear]) -> int:
    """The most rows that go faster through the plain weights of all layers, one after another, than through packed."""

    def seconds(rows: int, plain_rows: int) -> float:
        inputs = {width: torch.ones(rows, width) for width in {layer.plain.shape[1] for layer in layers}}
        for layer in layers:
            layer.plain_rows = plain_rows
        return _fastest(lambda: [layer(inputs[layer.plain.shape[1]]) for layer in layers])

    faster = (rows for rows in reversed(_FEW_ROWS) if seconds(rows, rows) < seconds(rows, 0))
    return next(faster, 0)


def _fastest(run: Callable[[], object], times: int = 4) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
