"""How well a training run uses its machine: FLOP/s that its ranks could reach, peak memory.

FLOPs of a token are those of the planner, `TrainedShape.flops_per_token`.
"""

from __future__ import annotations

import resource
import sys

import torch

from minilib.numbers.machine import Machine
from minilib.ranks import launch
from minilib.ranks.agreement import gather_numbers
from minilib.ranks.collectives import Communicator


def peak_flops(machine: Machine, precision: str, comm: Communicator | None) -> float:
    """FLOP/s that all ranks could reach: of one GPU a rank, or of the CPUs of every host with ranks. A collective.

    Raises:
        NotOnThisMachine: if the machine has no figure for this precision.
    """
    if comm is None:
        return machine.peak(precision)
    return machine.peak(precision) * (comm.world_size if machine.kind == "gpu" else len(set(launch.hosts())))


def peak_memory_per_rank(comm: Communicator | None, device: torch.device) -> list[int]:
    """Peak bytes of each rank's process since it began, on its GPU or else in main memory. A collective."""
    if device.type == "cuda":
        mine = torch.cuda.max_memory_allocated(device)
    else:
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [mine] if comm is None else gather_numbers(mine, comm)
