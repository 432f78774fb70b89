"""Under torchrun with two ranks: what run() returns, refuses and raises; each rank writes what it saw to a file.

Usage: torchrun … under_torchrun.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from minilib.ranks import launch


def caught(fn, *args, **options) -> list[str]:
    try:
        fn(*args, **options)
    except Exception as error:
        return [type(error).__name__, str(error), str(getattr(error, "rank", ""))]
    return []


def total(factor: int) -> float:
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return x.item() * factor


def rank_1_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("out of luck")
    dist.barrier()


seen = {
    "values": launch.run(lambda: (dist.get_rank(), os.getpid()), 2, timeout=60.0),
    "pid": os.getpid(),
    "again": launch.run(total, None, 10),
    "threads": launch.run(torch.get_num_threads, None, threads=2),
    "wrong world": caught(launch.run, total, 3, 10),
    "nested": launch.run(lambda: caught(launch.run, total, None, 1), None),
    "failure": caught(launch.run, rank_1_raises, None),
}
(Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
# Rank 1 leaves here; that is how rank 0, in its barrier, hears of the failure.
