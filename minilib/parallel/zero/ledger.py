"""What ZeRO should cost, in closed form: bytes that a rank holds, and bytes that it sends in a step.

    Ψ parameters, n ranks     parameters      gradients       Adam               sent in a step,
    stage                     fp32    bf16    fp32    bf16    fp32    bf16       values for (n-1)/n
    0   plain                 4Ψ      2Ψ      4Ψ      2Ψ      8Ψ      12Ψ        2Ψ
    1   cut the optimizer     4Ψ      2Ψ      4Ψ      2Ψ      8Ψ/n    12Ψ/n      2Ψ
    2   and gradients         4Ψ      2Ψ      4Ψ/n    2Ψ/n    8Ψ/n    12Ψ/n      2Ψ
    3   and parameters        4Ψ/n    2Ψ/n    4Ψ/n    2Ψ/n    8Ψ/n    12Ψ/n      3Ψ

With bf16 the optimizer's 12 bytes are an fp32 master copy of the parameter and Adam's two moments.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, sections 3
and 5 (bytes) and 7 (traffic).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import ceil_div

STAGES = (0, 1, 2, 3)


class Precision(NamedTuple):
    """In which dtype things are held.

    Args:
        parameters: in forward and backward.
        gradients: held and reduced.
        masters: what the optimizer updates.
    """

    parameters: torch.dtype
    gradients: torch.dtype
    masters: torch.dtype

    @property
    def mixed(self) -> bool:
        """Whether the optimizer has a copy of its own."""
        return self.masters != self.parameters


# Gradients of bf16 are bf16 from autograd on. Sent as fp32 they would take twice the memory and the time, to save the
# rounding of n - 1 additions; with many ranks that is worth it, and Megatron-LM does so.
PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, torch.float32),
    "fp64": Precision(torch.float64, torch.float64, torch.float64),
}


def expected_bytes(
    num_parameters: int, world_size: int, stage: int, precision: str = "fp32", *, moments: int = 2
) -> dict[str, int]:
    """Bytes that each rank holds between steps.

    Args:
        num_parameters: Ψ, all of them trained.
        world_size: n.
        stage: one of STAGES.
        precision: one of PRECISIONS.
        moments: values that the optimizer keeps of each parameter: 2 for Adam, 1 for momentum, 0 for plain SGD.

    Returns:
        {"parameters": …, "gradients": …, "optimizer": …}.

    Raises:
        ValueError: if the stage or the precision is unknown, or a number is too small.
    """
    dtypes = _checked(num_parameters, world_size, stage, precision)
    share = ceil_div(num_parameters, world_size)
    held = {name: share if stage >= cut else num_parameters for name, cut in _CUT_FROM.items()}
    optimizer = (dtypes.mixed + moments) * dtypes.masters.itemsize
    each = {"parameters": dtypes.parameters.itemsize, "gradients": dtypes.gradients.itemsize, "optimizer": optimizer}
    return {name: held[name] * each[name] for name in held}


def expected_traffic(
    num_parameters: int, world_size: int, stage: int, precision: str = "fp32", *, kept: int = 0
) -> int:
    """Bytes that each rank sends in a step: one forward, one backward, one update; without the norm for clipping.

    Args:
        num_parameters, world_size, stage, precision: see `expected_bytes`.
        kept: parameters that stage 3 does not gather again for the backward, since it never let go of them.

    Returns:
        Exact if every unit has a multiple of world_size parameters; otherwise padding comes on top.

    Raises:
        ValueError: see `expected_bytes`.
    """
    dtypes = _checked(num_parameters, world_size, stage, precision)
    gradients = num_parameters * dtypes.gradients.itemsize * (2 if stage == 0 else 1)
    gathered = {0: 0, 3: 2 * num_parameters - kept}.get(stage, num_parameters)
    return (gradients + gathered * dtypes.parameters.itemsize) * (world_size - 1) // world_size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


_CUT_FROM = {"parameters": 3, "gradients": 2, "optimizer": 1}  # the first stage that cuts it


def check_stage(stage: int) -> None:
    """Raise ValueError for an unknown stage."""
    if stage not in STAGES:
        raise ValueError(f"stage is 0 (nothing is cut), 1 (optimizer state), 2 (and gradients) or 3 (and parameters); "
                         f"got {stage!r}")  # fmt: skip


def check_precision(precision: str) -> Precision:
    """The dtypes of that name, or ValueError."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}")
    return PRECISIONS[precision]


def _checked(num_parameters: int, world_size: int, stage: int, precision: str) -> Precision:
    check_stage(stage)
    if num_parameters < 1 or world_size < 1:
        raise ValueError(f"there is at least 1 parameter and 1 rank, got {num_parameters!r} and {world_size!r}")
    return check_precision(precision)
