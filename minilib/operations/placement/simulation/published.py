"""Traces that are drawn after published ones: the same share of jobs and of GPU time by size, the same median run.

    shape = published_shape("philly")
    trace = shape.draw(jobs=10_000, gpus=1_024, load=0.85, seed=0)

Runs of one size are log-normal. Their means follow from the two shares; the spread, one for all sizes, from the median
of all runs. Draws are stratified: each size has its number of jobs, each quantile of runs its job, and runs of a size
are scaled to their mean, none longer than the longest. So every trace has the quoted shares; only the order, the
arrivals and what happens within a stratum are chance.
"""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import NormalDist

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.simulation.traced_job import TracedJob

SHAPES = Path(__file__).with_name("published.toml")
WIDEST = 8.0  # standard deviation of the logarithm of runs; what traces have is about 2


class UnknownShape(LookupError):
    """There is no published shape of this name; the message lists those that are."""


@dataclass(frozen=True)
class DrawnJobs:
    """What the jobs of a drawn trace have beside sizes and runs.

    Args:
        tenants: how many; the k-th has 1/k as many jobs as the first.
        priorities: 0 … n − 1, each as often.
        host_gpus: a job of no more lies on one host, a larger one on whole hosts; None: GPUs lie anywhere.
        segment: jobs of no fewer GPUs come in segments of so many within an NVLink domain; None for no segments.
        checkpoint_every: seconds; None for jobs that keep nothing.
        restart_seconds: of each job.
    """

    tenants: int = 8
    priorities: int = 3
    host_gpus: int | None = 8
    segment: int | None = None
    checkpoint_every: float | None = 3600
    restart_seconds: float = 300


@dataclass(frozen=True)
class TraceShape:
    """Jobs of a cluster, by GPUs.

    Args:
        name: of the cluster.
        jobs: GPUs → share of all jobs; any unit.
        gpu_time: GPUs → share of all GPU time; any unit.
        gpu_seconds: mean of a job.
        median_seconds: of all runs.
        longest_seconds: of all runs.

    Raises:
        ValueError: if the two do not have the same sizes, or a share or time is not above 0.
    """

    name: str
    jobs: Mapping[int, float]
    gpu_time: Mapping[int, float]
    gpu_seconds: float
    median_seconds: float
    longest_seconds: float

    def __post_init__(self) -> None:
        if not self.jobs or self.jobs.keys() != self.gpu_time.keys():
            raise ValueError(f"{self.name}: jobs have sizes {sorted(self.jobs)} and GPU time {sorted(self.gpu_time)}: "
                             "give both for each size, and one size or more")  # fmt: skip
        for gpus in self.jobs:
            check_whole(f"GPUs of a job of {self.name}", gpus, 1)
            check_quantity(f"share of jobs of {gpus} GPUs", self.jobs[gpus], above_zero=True)
            check_quantity(f"share of GPU time of {gpus} GPUs", self.gpu_time[gpus], above_zero=True)
        for what in ("gpu_seconds", "median_seconds", "longest_seconds"):
            check_quantity(f"{what} of {self.name}", getattr(self, what), above_zero=True)

    def mean_seconds(self, gpus: int) -> float:
        """Mean run of jobs of a size."""
        jobs, time = self.jobs[gpus] / sum(self.jobs.values()), self.gpu_time[gpus] / sum(self.gpu_time.values())
        return time * self.gpu_seconds / (jobs * gpus)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the logarithm of runs of a size, with which the median of all runs is the quoted one.

        0 if even runs that are all alike are shorter than that.
        """
        low, high = 0.0, WIDEST
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._below_median(middle) < 0.5 else (low, middle)
        return low

    def draw(
        self,
        jobs: int,
        gpus: int,
        load: float,
        seed: int = 0,
        most_gpus: int | None = None,
        longest_seconds: float | None = None,
        beside: DrawnJobs = DrawnJobs(),  # noqa: B008 (frozen)
    ) -> list[TracedJob]:
        """A trace, in order of arrival; arrivals are uniform over the time that makes the load, in whole seconds.

        Args:
            jobs: how many.
            gpus: of the cluster that they load.
            load: GPU-seconds that come in a second, as a share of the cluster's GPUs.
            seed: of all choices.
            most_gpus: larger sizes are left out; the cluster's if left out.
            longest_seconds: runs are cut there, and the load is that of the cut runs; the quoted longest if left out.
            beside: what jobs have beside that.

        Raises:
            ValueError: if a number is none, or no size is left.
        """
        check_whole("jobs", jobs)
        check_whole("gpus", gpus, 1)
        check_quantity("load", load, above_zero=True)
        longest = self.longest_seconds if longest_seconds is None else longest_seconds
        check_quantity("longest_seconds", longest, above_zero=True)
        chance = random.Random(f"{self.name} {seed}")
        drawn = [(size, run) for size, count in self._counts(jobs, min(gpus, most_gpus or gpus)).items()
                 for run in self._runs(size, count, longest, chance)]  # fmt: skip
        chance.shuffle(drawn)
        span = sum(size * run for size, run in drawn) / (load * gpus)
        arrivals = sorted(round(chance.uniform(0, span)) for _ in drawn)
        named = zip(arrivals, drawn, strict=True)
        return [
            _traced(f"{self.name}-{number}", size, run, at, beside, chance)
            for number, (at, (size, run)) in enumerate(named)
        ]

    def _below_median(self, spread: float) -> float:
        """Share of runs that are shorter than the quoted median."""
        all_jobs, found = sum(self.jobs.values()), 0.0
        for gpus, jobs in self.jobs.items():
            middle = math.log(self.mean_seconds(gpus)) - spread**2 / 2
            above = math.log(self.median_seconds) - middle
            found += jobs / all_jobs * (NormalDist().cdf(above / spread) if spread else float(above > 0))
        return found

    def _counts(self, jobs: int, most_gpus: int) -> dict[int, int]:
        """How many jobs of each size, rounded so that they add up."""
        shares = {gpus: share for gpus, share in self.jobs.items() if gpus <= most_gpus}
        if not shares:
            raise ValueError(f"{self.name} has no job of {most_gpus} GPUs or fewer; its sizes are {sorted(self.jobs)}")
        exact = {gpus: share / sum(shares.values()) * jobs for gpus, share in shares.items()}
        counts = {gpus: int(count) for gpus, count in exact.items()}
        by_rest = sorted(exact, key=lambda gpus: counts[gpus] - exact[gpus])
        for gpus in by_rest[: jobs - sum(counts.values())]:
            counts[gpus] += 1
        return counts

    def _runs(self, gpus: int, count: int, longest: float, chance: random.Random) -> list[int]:
        """Runs of one size, in whole seconds, one of each of `count` quantiles; before the cut their mean is exact."""
        places = [(number + chance.uniform(0.001, 0.999)) / count for number in range(count)]
        raw = [math.exp(self.spread * NormalDist().inv_cdf(place)) for place in places]
        scale = _scale_to(self.mean_seconds(gpus) * count, raw, self.longest_seconds)
        return [max(1, min(round(min(scale * each, self.longest_seconds)), int(longest))) for each in raw]


def _scale_to(total: float, values: Sequence[float], most: float) -> float:
    """By what to multiply values, each then cut at `most`, so that they add up to a total."""
    low, high = 0.0, total / min(values, default=1.0)
    for _ in range(100):
        middle = (low + high) / 2
        enough = sum(min(middle * value, most) for value in values) >= total
        low, high = (low, middle) if enough else (middle, high)
    return high


@cache
def published_shape(name: str) -> TraceShape:
    """The shape of a published trace.

    Args:
        name: "philly", "helios" or "seren".

    Raises:
        UnknownShape: if there is none of this name.
    """
    shapes = tomllib.loads(SHAPES.read_text(encoding="utf-8"))
    if name not in shapes:
        raise UnknownShape(f"no published trace is named {name!r}; there are {', '.join(shapes)}")
    found = shapes[name]
    for shares in ("jobs", "gpu_time"):
        found[shares] = {int(gpus): share for gpus, share in found[shares].items()}
    return TraceShape(name, **found)


def _traced(name: str, gpus: int, seconds: int, arrival: int, beside: DrawnJobs, chance: random.Random) -> TracedJob:
    weights = [1 / (number + 1) for number in range(beside.tenants)]
    tenant = chance.choices(range(beside.tenants), weights)[0]
    whole = min(gpus, beside.host_gpus) if beside.host_gpus else None
    job = GangJob(
        name, gpus, gpus_per_host=whole, tenant=f"tenant{tenant}", priority=chance.randrange(beside.priorities),
        seconds=seconds, checkpoint_every=beside.checkpoint_every, restart_seconds=beside.restart_seconds,
        segment=beside.segment if beside.segment and gpus % beside.segment == 0 else None,
    )  # fmt: skip
    return TracedJob(job, arrival, seconds)
