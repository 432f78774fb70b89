"""A bit that flips, as a particle or a failing cell would have it: for tests and drills."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_bit(tensor: Tensor, bit: int) -> None:
    """Flip one bit of a tensor in memory, in place.

    Args:
        tensor: contiguous, of any dtype, on the CPU.
        bit: from 0 to 8 · nbytes − 1.

    Raises:
        ValueError: if there is no such bit, or the tensor is not contiguous.
    """
    if not tensor.is_contiguous() or not 0 <= bit < 8 * tensor.nbytes:
        raise ValueError(f"there is no bit {bit} in {tensor.nbytes} contiguous bytes")
    tensor.detach().view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
