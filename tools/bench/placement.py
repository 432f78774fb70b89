"""Measure decisions of the gang scheduler on clusters of 100 to 10,000 hosts; simulate placements and policies.

A cluster is filled to 85 %, or until jobs wait. Then jobs end and others arrive by turns, a decision for each arrival:
it is accepted, the first in line and those that may go ahead are placed, and all counts are brought up to date.

Fragmentation and policies are simulated on traces that are drawn after published ones: counts, and no clock.
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
from minilib.operations.placement.simulation.comparison import PLACINGS, ComparedScheduler, compare_schedulers
from minilib.operations.placement.simulation.host_failures import drawn_failures
from minilib.operations.placement.simulation.published import DrawnJobs, published_shape
from minilib.ranks.mesh_shape import MeshShape

HOSTS = (100, 1_000, 10_000)
SIZES, WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (20, 15, 15, 20, 10, 8, 5, 4, 2, 1)
LOAD = 0.85
WAITING, DECISIONS = 50, 300
DGX, NVL72 = GpuCluster.regular(32, 4), GpuCluster.regular(16, 18, 4, nvlink_domain=72, gpu="gb200")
MIXES = (("philly", DGX), ("helios", DGX), ("seren", DGX), ("philly", NVL72))
TRACED, DAY = 10_000, 86_400
SEEDS, FEW_SEEDS = 5, 2  # of the mixes for which a goal is set, and of those beside them
POLICIES_COMPARED = ("fcfs", "srpt", "priority", "fair_share")


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


def fragmentation(shape: str, cluster: GpuCluster, seed: int, jobs: int = TRACED) -> list[dict]:
    """The largest gangs that fit at 85 % load, by placement: averaged over the second half of arrivals, and at the end.

    Args:
        shape: of the jobs, as a trace was published; runs are cut at a day, and no job has more than 256 GPUs.
        cluster: that they load.
        seed: of the trace.
        jobs: that arrive.
    """
    beside = DrawnJobs(host_gpus=cluster.largest_host)
    trace = published_shape(shape).draw(jobs, cluster.gpus, LOAD, seed, 256, DAY, beside)
    until = trace[-1].arrival
    compared = [ComparedScheduler(placing=placing) for placing in PLACINGS if placing != "moves"]
    rows = compare_schedulers(trace, cluster, compared, until=until, after=until / 2)
    return [
        {
            "shape": shape,
            "cluster": cluster.name,
            "seed": seed,
            "placing": each.placing,
            "utilisation": row.utilisation,
            "goodput": row.goodput,
            "moves": row.moves,
            "free": row.free,
            "largest": row.largest._asdict(),
            "at_the_end": row.run.instants[-1].largest._asdict(),
        }
        for each, row in zip(compared, rows, strict=True)
    ]


def policies(jobs: int = TRACED // 4, seed: int = 0) -> list[dict]:
    """One trace of Helios's shape on 256 GPUs at 95 % load, with failures, by policy, backfill and placement."""
    cluster = GpuCluster.regular(8, 4)
    trace = published_shape("helios").draw(jobs, cluster.gpus, 0.95, seed, 128, DAY / 4)
    compared = [ComparedScheduler(name, backfill) for name in POLICIES_COMPARED for backfill in (False, True)]
    compared += [ComparedScheduler(placing=placing) for placing in PLACINGS if placing != "best fit"]
    rows = compare_schedulers(
        trace, cluster, compared, lambda: drawn_failures(len(cluster.hosts), 1 / 500, 3_600, seed), trace[-1].arrival
    )
    shown = (
        "name",
        "utilisation",
        "goodput",
        "idle_wanted",
        "median_wait",
        "p90_wait",
        "mean_wait",
        "fairness",
        "moves",
    )
    return [{name: getattr(row, name) for name in shown} for row in rows]


def placement(
    hosts: tuple[int, ...] = HOSTS, count: int = DECISIONS, seeds: int = SEEDS, jobs: int = TRACED, mixes: tuple = MIXES
) -> dict:
    """The figures of chapter 20, JSON values in SI units."""
    rows = [(each, waiting) for each in hosts for waiting in (0, WAITING)]
    traces = [(*mix, seed) for mix in mixes for seed in range(seeds if mix in MIXES[:2] else min(seeds, FEW_SEEDS))]
    return {
        "decisions": [decisions(*row, count) for row in tqdm(rows, desc="decisions", leave=False)],
        "fragmentation": [
            row for each in tqdm(traces, desc="fragmentation", leave=False) for row in fragmentation(*each, jobs)
        ],
        "policies": policies(jobs // 4),
    }


def lines(found: dict) -> Iterator[str]:
    """What was found, in words."""
    for row in found["decisions"]:
        busy = f"{row['hosts']} hosts, {row['gpus']} GPUs, {row['running']} jobs run and {row['waiting']} wait"
        yield (f"{busy}: {row['seconds'] * 1e3:.2f} ms a decision ({row['slowest'] * 1e3:.1f} the slowest), "
               f"{row['looked_at']:.0f} looks")  # fmt: skip
    for row in found["fragmentation"]:
        first = next(each for each in found["fragmentation"] if each["placing"] == "first fit"
                     and all(each[same] == row[same] for same in ("shape", "cluster", "seed")))  # fmt: skip
        level = largest_asked_for(row["cluster"])
        largest, beside = row["largest"][level], first["largest"][level]
        yield (f"{row['shape']} on {row['cluster']}, seed {row['seed']}, {row['placing']}: {largest:.0f} GPUs in one "
               f"{level}, {largest / max(beside, 1):.2f} of first fit; {row['free']:.0f} free, "
               f"{row['goodput'] - first['goodput']:+.2%} goodput, {row['moves']} moves")  # fmt: skip
    for row in found["policies"]:
        shares = f"{row['utilisation']:.1%} used, {row['goodput']:.1%} useful"
        yield (f"{row['name']}: {shares}, waits {row['mean_wait']:.0f} s on average, 90 % {row['p90_wait']:.0f} s "
               f"at most, fairness {row['fairness']:.2f}")  # fmt: skip


def largest_asked_for(cluster: str) -> str:
    """The level whose largest gang is the figure of a comparison: a domain if it is more than one host, else a unit."""
    return "domain" if cluster == NVL72.name else "unit"


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
