"""Where a parity case runs: Triton's interpreter on the CPU, or a GPU. One set of cases serves both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2}  # of 1 + |value|


@dataclass(frozen=True)
class Place:
    """A device, and whether kernels are interpreted there.

    Args:
        device: "cpu" or "cuda".
        interpret: what to pass as the op's `interpret`.
    """

    device: str
    interpret: bool

    def random(self, *shape: int, dtype: str = "fp32", seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        """Normal values of one dtype, the same on every device; each tensor of a case wants a seed of its own."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (scale * values).to(DTYPES[dtype]).to(self.device)

    def strided(self, x: torch.Tensor) -> torch.Tensor:
        """The same values with gaps between rows, whose content is NaN: reading past a row's end shows."""
        room = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device)
        room[..., : x.shape[-1]] = x
        return room[..., : x.shape[-1]]


def distance(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """The largest error, as a share of 1 + |value|; infinite where just one of the two is not a finite number."""
    assert ours.shape == oracle.shape, f"shapes {tuple(ours.shape)} and {tuple(oracle.shape)}"
    ours, oracle = ours.detach().double().cpu(), oracle.detach().double().cpu()
    error = (ours - oracle).abs() / (1 + oracle.abs())
    error[ours == oracle] = 0  # infinities that agree
    return error.nan_to_num(math.inf).max().item() if error.numel() else 0.0


def assert_close(ours: torch.Tensor, oracle: torch.Tensor, dtype: str, times: float = 1.0) -> None:
    """Within `times` the tolerance of the dtype; NaN never passes."""
    found = distance(ours, oracle)
    assert found <= times * TOLERANCE[dtype], f"off by {found:.2e}, allowed are {times * TOLERANCE[dtype]:.2e}"
