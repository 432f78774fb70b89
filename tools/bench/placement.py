"""Measure decisions of the gang scheduler on clusters of 100 to 10,000 hosts.

A cluster is filled to 85 %, or until jobs wait. Then jobs end and others arrive by turns, a decision for each arrival:
it is accepted, the first in line and those that may go ahead are placed, and all counts are brought up to date.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator

from tqdm import tqdm

from minilib.numbers.measure import quartiles
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.ranks.mesh_shape import MeshShape

HOSTS = (100, 1_000, 10_000)
SIZES, WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (20, 15, 15, 20, 10, 8, 5, 4, 2, 1)
LOAD = 0.85
WAITING, DECISIONS = 50, 300


def decisions(hosts: int, waiting: int = 0, count: int = DECISIONS, seed: int = 0) -> dict:
    """Seconds of a decision, and how many hosts and groups it looks at.

    Args:
        hosts: of eight GPUs each, four to a rack.
        waiting: jobs in line, at least; then room is kept for the first, and others may go ahead.
        count: decisions that are measured.
        seed: of all choices.
    """
    choices = random.Random(seed)
    scheduler = GangScheduler(GpuCluster.regular(hosts // 4, 4))
    jobs, now, enough = _jobs(choices, most=hosts * 2), 0.0, (1 - LOAD) * scheduler.cluster.gpus
    while scheduler.free.free > enough or len(scheduler.policy) < waiting:
        scheduler.submit(next(jobs), now)
        scheduler.start(now)
    seconds, looks = [], []
    for _ in range(count):
        now += 1.0
        ended = False
        while not ended or (not waiting and scheduler.free.free < enough):
            scheduler.finish(choices.choice(list(scheduler.running)), now)
            ended = True
        job, before, started = next(jobs), scheduler.free.looked_at, time.perf_counter()
        scheduler.submit(job, now)
        scheduler.start(now)
        seconds.append(time.perf_counter() - started)
        looks.append(scheduler.free.looked_at - before)
        while len(scheduler.policy) < waiting:
            scheduler.submit(next(jobs), now)
            scheduler.start(now)
    scheduler.check_invariants()
    low, high = quartiles(seconds)
    return {
        "hosts": hosts,
        "gpus": scheduler.cluster.gpus,
        "waiting": waiting,
        "running": len(scheduler.running),
        "decisions": count,
        "seconds": statistics.median(seconds),
        "quartiles": [low, high],
        "slowest": max(seconds),
        "looked_at": statistics.median(looks),
        "most_looked_at": max(looks),
    }


def placement(hosts: tuple[int, ...] = HOSTS, count: int = DECISIONS) -> dict:
    """The figures of chapter 20, JSON values in SI units."""
    rows = [(each, waiting) for each in hosts for waiting in (0, WAITING)]
    return {"decisions": [decisions(*row, count) for row in tqdm(rows, desc="decisions", leave=False)]}


def lines(found: dict) -> Iterator[str]:
    """What was found, in words."""
    for row in found["decisions"]:
        busy = f"{row['hosts']} hosts, {row['gpus']} GPUs, {row['running']} jobs run and {row['waiting']} wait"
        yield (f"{busy}: {row['seconds'] * 1e3:.2f} ms a decision ({row['slowest'] * 1e3:.1f} the slowest), "
               f"{row['looked_at']:.0f} looks")  # fmt: skip


def _jobs(choices: random.Random, most: int) -> Iterator[GangJob]:
    """Jobs of powers of two GPUs, most of them small; tp within a host."""
    number = 0
    while True:
        gpus = min(choices.choices(SIZES, WEIGHTS)[0], most)
        tp = min(gpus, choices.choice((1, 2, 4, 8)))
        yield GangJob(
            f"job{number}", gpus, mesh=MeshShape.of(dp=gpus // tp, tp=tp), seconds=choices.randint(60, 86_400)
        )
        number += 1
