"""Under torchrun: sum what differs per rank, time a message to the last rank, and write all of it to a file.

Usage: torchrun … two_hosts.py RESULTS NBYTES
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from minilib.ranks import launch


def seconds_to_the_last_rank(nbytes: int) -> float:
    """Seconds from rank 0's send of `nbytes` to the last rank until one byte has come back."""
    message, answer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    last = dist.get_world_size() - 1
    elapsed = 0.0
    for _ in range(2):  # the first round opens the connection
        dist.barrier()
        started = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(message, last)
            dist.recv(answer, last)
        elif dist.get_rank() == last:
            dist.recv(message, 0)
            dist.send(answer, 0)
        elapsed = time.perf_counter() - started
    return elapsed


def work(nbytes: int) -> dict:
    x = torch.arange(4.0) * 10 ** dist.get_rank()
    dist.all_reduce(x)
    return {"sum": x.tolist(), "hosts": launch.hosts(), "seconds": seconds_to_the_last_rank(nbytes)}


results = launch.run(work, None, int(sys.argv[2]), timeout=60.0)
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(results))
