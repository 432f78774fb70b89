"""Time torch's own all-reduce (gloo) between processes on this machine, over loopback."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT = 60.0  # seconds for the whole group, its start included


class RankFailed(RuntimeError):
    """A rank of the group died or did not finish in time; the message holds its last words."""


def all_reduce(nbytes: int, world_size: int = 2, repeats: int = 7) -> float:
    """Median seconds of summing an fp32 tensor of `nbytes` over `world_size` processes, as rank 0 sees it.

    Raises:
        RankFailed: if a rank dies or the group takes longer than a minute; no process is left behind.
        ValueError: if there is nothing to send or nobody to send it to.

    Cost: about 3 s to start the group, then `repeats` × 2 (n−1)/n · nbytes over loopback per rank.
    """
    if nbytes < 4 or world_size < 2:
        raise ValueError(f"needs ≥ 4 bytes and ≥ 2 processes, got nbytes={nbytes}, world_size={world_size}")
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        command = [sys.executable, "-m", __name__, str(rendezvous), str(world_size), str(nbytes), str(repeats)]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=TIMEOUT) for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise RankFailed(f"the group of {world_size} did not finish within {TIMEOUT:.0f} s") from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    for number, (rank, (_, errors)) in enumerate(zip(ranks, outputs, strict=True)):
        if rank.returncode != 0:
            last = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {rank.returncode}"
            raise RankFailed(f"rank {number} of {world_size} failed: {last}")
    return float(outputs[0][0])


def _rank(rendezvous: str, world_size: int, nbytes: int, repeats: int, rank: int) -> None:
    import datetime
    import statistics
    import time

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        world_size=world_size,
        rank=rank,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    tensor = torch.full((nbytes // 4,), float(rank + 1))
    samples = []
    for _ in range(repeats + 1):
        tensor.fill_(float(rank + 1))
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        samples.append(time.perf_counter() - started)
    expected = world_size * (world_size + 1) / 2
    assert bool((tensor == expected).all()), f"the sum should be {expected}, got {tensor[0].item()}"
    dist.destroy_process_group()
    if rank == 0:
        print(statistics.median(samples[1:]))  # the first one opens the connections


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rendezvous")
    for name in ("world_size", "nbytes", "repeats", "rank"):
        parser.add_argument(name, type=int)
    _rank(**vars(parser.parse_args()))
