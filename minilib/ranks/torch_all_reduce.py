"""Time torch's own all-reduce (gloo) between processes on this machine, over loopback."""

from __future__ import annotations

import statistics
from functools import partial

from minilib.ranks import launch


def all_reduce(nbytes: int, world_size: int = 2, repeats: int = 7) -> float:
    """Median seconds of summing an fp32 tensor of `nbytes` over `world_size` processes, on the slowest of them.

    Raises:
        RankFailed: if a rank dies; no process is left behind.
        RanksTimedOut: if all of it takes longer than a minute.
        ValueError: if there is nothing to send or nobody to send it to.

    Cost: `repeats` × 2 (n−1)/n · nbytes over loopback per rank, and what `launch.run` takes.
    """
    if nbytes < 4 or world_size < 2:
        raise ValueError(f"needs ≥ 4 bytes and ≥ 2 processes, got nbytes={nbytes}, world_size={world_size}")
    return launch.run(_median_seconds, world_size, nbytes // 4, repeats, timeout=60)[0]


def _median_seconds(size: int, repeats: int) -> float:
    import torch
    import torch.distributed as dist

    from minilib.ranks.turns import seconds_in_turns

    tensor = torch.full((size,), float(dist.get_rank() + 1))
    dist.all_reduce(tensor)  # opens the connections, too
    expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    assert bool((tensor == expected).all()), f"the sum should be {expected}, got {tensor[0].item()}"
    times = seconds_in_turns({"all_reduce": partial(dist.all_reduce, tensor.zero_())}, turns=repeats, warm_up=0)
    return statistics.median(times["all_reduce"])
