"""A model made ready for decoding on a CPU, where a step multiplies few rows and is made of many small calls.

Its matrices are packed: put once into the order in which oneDNN's product reads them. torch's own `nn.Linear` hands
fp32 weights to the BLAS as they are, which is slow for a few rows:

    25 million parameters, torch 2.13, 2 cores    1 row           8 rows         32 rows     plain / packed
    AMD EPYC                                                      15 / 4 ms
    Intel Xeon                                    2.2 / 2.9 ms    5.0 / 4.0 ms   9.1 / 7.7 ms

A packed matrix takes the place of the plain one, so that weights are in memory once and no copy can grow stale. An
embedding table that is the output projection, too, stays plain, for its rows are looked up; oneDNN takes it as it is.
`torch.compile` packs with the same two operations, but needs a C++ compiler on the reader's machine. Norms are
computed in four calls instead of the eight behind `F.rms_norm`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_ROWS = 32  # the batch that oneDNN chooses the order for; it was the best order, or as good as any, for 1 to 256 rows


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


class PackedLinear(_Moved):
    """A linear layer through oneDNN; for inference only.

    Args:
        linear: the layer that it replaces, fp32 on the CPU.
        shared: whether its weight is needed elsewhere: it is then used as it is, else it is moved.
    """

    def __init__(self, linear: nn.Linear, shared: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.matrix = weight if shared else torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.bias = linear.bias
        if not shared:
            _empty(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")


class FewCallsRMSNorm(_Moved):
    """x / √(mean(x²) + eps) · weight, written as √d · weight · x / √(|x|² + d · eps); for inference only.

    Args:
        norm: the layer that it replaces.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        weight = norm.weight.detach()
        self.scale = weight * math.sqrt(len(weight))
        self.least = torch.tensor([math.sqrt(len(weight) * norm.eps)])
        _empty(norm.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        h = x if residual is None else residual + x
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True).hypot_(self.least)
        y = torch.div(h, length).mul_(self.scale)
        return y if residual is None else (y, h)


def pack(model: Model) -> Model:
    """Move a model's weights into their packed form, in place, where that can be had: fp32 on a CPU with oneDNN.

    From then on the model computes and does nothing else: whoever still holds one of the parameters that were moved,
    such as an optimizer, holds an empty tensor. Packing once more changes nothing.

    Returns:
        The model.

    Cost: at any time one matrix more than the weights in memory.
    """
    here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not here or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return model
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, shared=owners[child.weight] > 1))
            elif isinstance(child, nn.RMSNorm):
                setattr(module, name, FewCallsRMSNorm(child))
    return model


def _empty(parameter: nn.Parameter) -> None:
    """Free what a parameter holds, for everybody who holds it."""
    parameter.data = parameter.data.new_empty(0)
