"""How collectives combine tensors, and which tensors they take."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from minilib.ranks.transport.base import Combine

COMBINE: dict[str, Combine] = {
    "sum": Tensor.add_,
    "avg": Tensor.add_,
    "product": Tensor.mul_,
    "min": lambda there, came: torch.minimum(there, came, out=there),
    "max": lambda there, came: torch.maximum(there, came, out=there),
    "band": Tensor.bitwise_and_,
    "bor": Tensor.bitwise_or_,
    "bxor": Tensor.bitwise_xor_,
}


def check_tensor(tensor: Tensor, op: str | None) -> None:
    """Refuse what no transport carries, and what `op` does not apply to.

    Args:
        tensor: what a collective is called with.
        op: one of COMBINE; None if nothing is combined.

    Raises:
        ValueError: which says what came.
    """
    if tensor.device.type != "cpu":
        raise ValueError(f"these transports carry CPU tensors, got one on {tensor.device}; "
                         "TorchCommunicator carries those of GPUs, over NCCL")  # fmt: skip
    if tensor.layout != torch.strided:
        raise ValueError(f"collectives take dense tensors, got {tensor.layout}")
    if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"collectives take tensors whose values all have a place of their own, got an expanded one, "
                         f"of strides {tensor.stride()}")  # fmt: skip
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("collectives take tensors as they lie in memory; call .resolve_conj() or .resolve_neg() first")
    if op is not None and op not in COMBINE:
        raise ValueError(f"op is one of {', '.join(COMBINE)}; got {op!r}")
    if op == "avg" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"the average of {tensor.dtype} is no {tensor.dtype}; use op='sum' and divide")
    if op is not None and not _applies(op, tensor.dtype):
        raise ValueError(f"op {op!r} does not apply to {tensor.dtype}")


def check_contiguous(tensor: Tensor) -> None:
    """Refuse a tensor with gaps or a transposed one.

    Raises:
        ValueError: which says what came.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"takes contiguous tensors, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
                         "call .contiguous()")  # fmt: skip


@lru_cache
def _applies(op: str, dtype: torch.dtype) -> bool:
    """Whether torch combines such tensors so: bitwise operations want integers, min and max an order, …"""
    one = torch.zeros(1, dtype=dtype)
    try:
        COMBINE[op](one, one.clone())
    except RuntimeError:
        return False
    return True
