"""How well a training run uses its machine: FLOPs a token, FLOP/s that its ranks could reach, peak memory."""

from __future__ import annotations

import resource
import sys

import torch

from minilib.model.config import ModelConfig
from minilib.numbers.machine import Machine
from minilib.ranks import launch
from minilib.ranks.agreement import gather_numbers
from minilib.ranks.collectives import Communicator


def flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of forward and backward for one token.

    Forward: 2 for each weight in a matrix product, and 4 for each value of a query head (scores, weighted sum) times
    half the context, which causal attention reads on average. Backward: twice as many. An embedding table that is not
    tied is a lookup without a product.

    Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B, which counts attention to the
    whole context.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_dim * 4 * context // 2
    return 3 * (2 * (config.num_active_parameters - lookup) + attention)


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
