"""Who computes a decoder and its loss: plain torch, or this library's Triton kernels. Chosen once a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the target of a token that does not count, as torch has it


class Ops:
    """Plain torch: one operation after the other, each reading and writing memory.

    Attributes:
        compiled: whether this is the compiled code of `minilib.serving.cpu`, and the model is packed for it.
    """

    compiled = False

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise if the model's weights cannot go where `fn` brings a tensor: plain ones can go anywhere."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise the last dimension of x; with a residual that of residual + x, and hand the sum back as well."""
        h = x if residual is None else residual + x
        y = F.rms_norm(h, weight.shape, weight.to(h.dtype), eps)  # under autocast the weight's dtype is another
        return y if residual is None else (y, h)

    def rotary(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Turn the heads of x, (..., heads, head_dim), by their positions; see `rotate`."""
        return rotate(x, rope)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up of the two halves of the last dimension."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def grouped_matmul(self, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Rows sorted by group, each times the matrix of its group; see minilib/kernels/matmul/grouped.py."""
        from minilib.kernels.matmul.grouped import reference

        return reference(rows, weight, offsets)

    def causal_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention for training; see `causal_attention`."""
        return causal_attention(layer, q, k, v)

    def loss(self, features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (...) under the logits features (..., hidden_size) @ weight.T."""
        logits = F.linear(features, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, -2).to(wide), targets.flatten())


class KernelOps(Ops):
    """One kernel an operation; heads of a size that has none stay plain torch.

    Kernels want one dtype where autocast gives them two.

    Args:
        interpret: run them in Triton's interpreter, on the CPU.
    """

    def __init__(self, interpret: bool) -> None:
        # Here, so that a model without kernels never loads Triton, which decides then whether it interprets.
        from minilib.kernels.cross_entropy.linear import linear_cross_entropy
        from minilib.kernels.flash_attention import HEAD_DIMS, flash_attention
        from minilib.kernels.matmul.grouped import grouped_matmul
        from minilib.kernels.rowwise.rms_norm import rms_norm
        from minilib.kernels.rowwise.rotary import rotary
        from minilib.kernels.rowwise.swiglu import swiglu

        self._head_dims = HEAD_DIMS
        self._rms_norm, self._rotary, self._swiglu, self._grouped_matmul, self._flash_attention, self._loss = (
            partial(op, interpret=interpret)
            for op in (rms_norm, rotary, swiglu, grouped_matmul, flash_attention, linear_cross_entropy)
        )

    def rms_norm(self, x, weight, residual, eps):
        x = x if residual is None else x.to(residual.dtype)
        return self._rms_norm(x, weight.to(x.dtype), residual, eps)

    def rotary(self, x, rope):
        return self._rotary(x, *(angle.to(x.dtype) for angle in rope))

    def swiglu(self, gate_up):
        return self._swiglu(gate_up)

    def grouped_matmul(self, rows, weight, offsets):
        return self._grouped_matmul(rows, weight, offsets)

    def causal_attention(self, layer, q, k, v):
        if q.shape[-1] not in self._head_dims:
            return super().causal_attention(layer, q, k, v)
        return self._flash_attention(q, k, v.to(q.dtype), causal=True)

    def loss(self, features, weight, targets):
        return self._loss(features, weight.to(features.dtype), targets)


def choose_ops(kernels: str) -> Ops:
    """The operations that `ModelConfig.kernels` names: "torch", "triton" or "interpreted"."""
    return Ops() if kernels == "torch" else KernelOps(interpret=kernels == "interpreted")


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pair (i, i + head_dim/2) of each head by its position: (..., heads, head_dim) → the same."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention for training: (batch, tokens, heads, head_dim), each token sees itself and those before it."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(-2, -3)
