"""Time torch's own all-reduce (gloo) between processes on this machine, over loopback."""

from __future__ import annotations

import statistics
import time

from minilib.ranks import launch


def all_reduce(nbytes: int, world_size: int = 2, repeats: int = 7) -> float:
    """Median seconds of summing an fp32 tensor of `nbytes` over `world_size` processes, as rank 0 sees it.

    Raises:
        RankFailed: if a rank dies; no process is left behind.
        RanksTimedOut: if the group takes longer than a minute.
        ValueError: if there is nothing to send or nobody to send it to.

    Cost: `repeats` × 2 (n−1)/n · nbytes over loopback per rank, and what `launch.run` takes.
    """
    if nbytes < 4 or world_size < 2:
        raise ValueError(f"needs ≥ 4 bytes and ≥ 2 processes, got nbytes={nbytes}, world_size={world_size}")
    return launch.run(_median_seconds, world_size, nbytes // 4, repeats)[0]


def _median_seconds(size: int, repeats: int) -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.empty(size)
    samples = []
    for _ in range(repeats + 1):
        tensor.fill_(float(dist.get_rank() + 1))
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        samples.append(time.perf_counter() - started)
    expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    assert bool((tensor == expected).all()), f"the sum should be {expected}, got {tensor[0].item()}"
    return statistics.median(samples[1:])  # the first one opens the connections
