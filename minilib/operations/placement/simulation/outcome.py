"""What a simulation counted: GPU-seconds by what became of them, waiting times, fairness, fragmentation over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from minilib.numbers.load_metrics import quantile
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.simulation.fragmentation import LargestGangs
from minilib.operations.placement.simulation.job_record import JobRecord


@dataclass
class ClusterSeconds:
    """GPU-seconds of a cluster as they pass, seen from the cluster; what jobs did with theirs, their records say.

    Args:
        gpus: of the cluster.
        busy: jobs had them.
        idle_wanted: free while somebody waited.
        idle: free while nobody waited.
        out: failed, or not to be had for another reason.
        down: of these, on hosts that failed.
        in_line: job-seconds of waiting: the length of the line, summed over time.
    """

    gpus: int
    busy: float = 0
    idle_wanted: float = 0
    idle: float = 0
    out: float = 0
    down: float = 0
    in_line: float = 0

    def add(self, seconds: float, busy: int, free: int, down: int, in_line: int) -> None:
        """So many seconds pass, in which nothing changes."""
        self.busy += seconds * busy
        self.out += seconds * (self.gpus - busy - free)
        self.down += seconds * down
        self.in_line += seconds * in_line
        if in_line:
            self.idle_wanted += seconds * free
        else:
            self.idle += seconds * free


class Instant(NamedTuple):
    """The cluster after what happened at one time.

    Args:
        now: seconds.
        running: jobs.
        waiting: jobs.
        free: GPUs.
        largest: gangs that would fit.
    """

    now: float
    running: int
    waiting: int
    free: int
    largest: LargestGangs


def jain_index(values: Collection[float]) -> float:
    """1 if all are equal, 1 / n if one has everything: (Σx)² / (n Σx²); 1 for none, or for zeros.

    Source: Jain, Chiu and Hawe, "A Quantitative Measure of Fairness and Discrimination for Resource Allocation in
    Shared Computer Systems", DEC TR-301, 1984.
    """
    most = max(values, default=0)  # by which all are divided, so that no square overflows or vanishes
    parts = [value / most for value in values] if most else []
    return sum(parts) ** 2 / (len(parts) * sum(part**2 for part in parts)) if parts else 1.0


@dataclass(frozen=True)
class SimulatedRun:
    """A trace after its simulation.

    Args:
        cluster: that ran it.
        span: seconds, from 0 on the clock.
        jobs: in order of arrival.
        seconds: GPU-seconds, seen from the cluster.
        instants: after each event, where they were asked for.
    """

    cluster: GpuCluster
    span: float
    jobs: list[JobRecord]
    seconds: ClusterSeconds
    instants: list[Instant] = field(default_factory=list)

    @property
    def capacity(self) -> float:
        """GPU-seconds that there were."""
        return self.cluster.gpus * self.span

    @property
    def useful(self) -> float:
        """GPU-seconds of work that counts."""
        return sum(job.useful() for job in self.jobs)

    @property
    def lost(self) -> float:
        """GPU-seconds of work that was lost."""
        return sum(job.lost() for job in self.jobs)

    @property
    def restarting(self) -> float:
        """GPU-seconds of restarts."""
        return sum(job.restarting() for job in self.jobs)

    @property
    def utilisation(self) -> float:
        """Share of the capacity that jobs had; 0 if no time passed."""
        return self.seconds.busy / self.capacity if self.capacity else 0.0

    @property
    def goodput(self) -> float:
        """Share of the capacity that was work that counts."""
        return self.useful / self.capacity if self.capacity else 0.0

    @property
    def makespan(self) -> float:
        """From the first arrival to the last end; 0 if nothing ended."""
        ends = [job.ended for job in self.jobs if job.ended is not None]
        return max(ends) - min(job.traced.arrival for job in self.jobs) if ends else 0.0

    @property
    def refused(self) -> list[JobRecord]:
        """Jobs that the cluster never runs."""
        return [job for job in self.jobs if job.refused is not None]

    @property
    def unfinished(self) -> list[JobRecord]:
        """Jobs that were not refused, and did not end."""
        return [job for job in self.jobs if job.refused is None and job.ended is None]

    def first_waits(self, least_gpus: int = 1, most_gpus: float = math.inf) -> list[float]:
        """Seconds from arrival to the first start, of jobs of a size that started."""
        return [job.started - job.traced.arrival for job in self.jobs
                if job.started is not None and least_gpus <= job.gpus <= most_gpus]  # fmt: skip

    def waits_by_size(self, edges: Sequence[int] = (1, 2, 9, 65)) -> dict[str, tuple[int, float, float]]:
        """Jobs that started, median wait and that of which 90 % are shorter, by GPUs.

        Args:
            edges: the least GPUs of each class.
        """
        found = {}
        for least, beyond in pairwise((*edges, math.inf)):
            if waits := self.first_waits(least, beyond - 1):
                name = (
                    f"{least}+"
                    if beyond == math.inf
                    else str(least)
                    if beyond == least + 1
                    else f"{least}–{beyond - 1}"
                )
                found[name] = (len(waits), quantile(waits, 0.5), quantile(waits, 0.9))
        return found

    def by_tenant(self, of: Callable[[Sequence[JobRecord]], float]) -> dict[str, float]:
        """A figure of each tenant's jobs."""
        tenants: dict[str, list[JobRecord]] = {}
        for job in self.jobs:
            if job.refused is None:
                tenants.setdefault(job.traced.job.tenant, []).append(job)
        return {tenant: of(jobs) for tenant, jobs in sorted(tenants.items())}

    @property
    def fairness_of_slowdown(self) -> float:
        """Jain's index over tenants of the mean slowdown of jobs that ended."""

        def mean(jobs: Sequence[JobRecord]) -> float:
            ended = [job.slowdown for job in jobs if job.ended is not None]
            return sum(ended) / len(ended) if ended else 0.0

        return jain_index([value for value in self.by_tenant(mean).values() if value])

    @property
    def fairness_of_service(self) -> float:
        """Jain's index over tenants of useful GPU-seconds; tenants that ask for other amounts make it small, too."""
        return jain_index(self.by_tenant(lambda jobs: sum(job.useful() for job in jobs)).values())

    def running_at(self, now: float) -> set[str]:
        """Names of the jobs that run after the events of a time."""
        return {job.traced.job.name for job in self.jobs for run in job.runs
                if run.start <= now and (run.end is None or run.end > now)}  # fmt: skip

    def sets_that_ran(self) -> Iterator[tuple[float, set[str]]]:
        """Each time at which another set of jobs runs, and the set."""
        changes: dict[float, list[tuple[int, str]]] = {}
        for job in self.jobs:
            for run in job.runs:
                if run.end is None or run.end > run.start:
                    changes.setdefault(run.start, []).append((1, job.traced.job.name))
                    changes.setdefault(run.end, []).append((0, job.traced.job.name))
        now_running: set[str] = set()
        for now in sorted(changes):
            before = now_running.copy()
            for starts, name in sorted(changes[now]):
                (now_running.add if starts else now_running.discard)(name)
            if now_running != before:
                yield now, now_running.copy()

    def mean_free(self, after: float = 0.0) -> tuple[float, LargestGangs]:
        """Free GPUs and the largest gangs that would fit, averaged over time.

        Args:
            after: the time from which it counts.

        Raises:
            ValueError: if no instants were kept, or no time is left.
        """
        if not self.instants or max(after, self.instants[0].now) >= self.span:
            raise ValueError(f"no instants were kept between {after} and {self.span}; simulate with instants=True")
        starts = [max(one.now, after) for one in self.instants]
        spans = [max(0.0, end - now) for now, end in zip(starts, (*starts[1:], self.span), strict=True)]

        def mean(values: Iterable[float]) -> float:
            return sum(span * value for span, value in zip(spans, values, strict=True)) / sum(spans)

        largest = LargestGangs(*(mean(one.largest[at] for one in self.instants) for at in range(4)))
        return mean(one.free for one in self.instants), largest

    def check_invariants(self) -> None:
        """Every GPU-second is useful, lost, restarting, idle (with somebody waiting or not) or out, and none is both;
        the line's length summed over time is what all jobs waited (Little's law)."""
        by_jobs = self.useful + self.lost + self.restarting
        by_cluster = self.seconds
        parts = by_jobs + by_cluster.idle_wanted + by_cluster.idle + by_cluster.out
        least = -1e-9 * max(self.capacity, 1)
        assert math.isclose(parts, self.capacity, rel_tol=1e-9), f"{parts} GPU-seconds of {self.capacity}"
        assert math.isclose(by_jobs, by_cluster.busy, rel_tol=1e-9), f"{by_jobs} by jobs, {by_cluster.busy} on GPUs"
        assert by_cluster.out - by_cluster.down >= least, "a GPU of a host that is down ran a job, or was free"
        assert all(min(job.useful(), job.lost(), job.restarting()) >= least for job in self.jobs), "below 0"
        waited = sum(job.waited for job in self.jobs)
        assert math.isclose(waited, by_cluster.in_line, rel_tol=1e-9), f"{waited} waited, {by_cluster.in_line} in line"
        for job in self.jobs:
            if job.ended is not None:
                assert math.isclose(job.useful(), job.gpus * job.traced.seconds, rel_tol=1e-9, abs_tol=1e-6)
