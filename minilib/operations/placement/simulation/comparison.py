"""One trace through several schedulers: the same jobs, arrivals and failures, another policy or placement each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minilib.mechanisms.scheduling import make_policy
from minilib.numbers.load_metrics import quantile
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.consolidation import ConsolidatingScheduler
from minilib.operations.placement.simulation.defragmentation import DefragmentingScheduler
from minilib.operations.placement.simulation.first_fit import first_fit
from minilib.operations.placement.simulation.fragmentation import LargestGangs
from minilib.operations.placement.simulation.host_failures import HostFailure
from minilib.operations.placement.simulation.outcome import SimulatedRun
from minilib.operations.placement.simulation.simulator import simulate_cluster
from minilib.operations.placement.simulation.traced_job import TracedJob

PLACINGS = ("first fit", "best fit", "moves", "consolidating")


@dataclass(frozen=True)
class ComparedScheduler:
    """A scheduler to be compared.

    Args:
        policy: by its name in `POLICIES`: "fcfs", "srpt", "priority", "fair_share" …
        backfill: let later jobs start as long as they do not delay the first.
        placing: one of PLACINGS.

    Raises:
        ValueError: if it is none of them; UnknownPolicy for a policy that there is not.
    """

    policy: str = "fcfs"
    backfill: bool = True
    placing: str = "best fit"

    def __post_init__(self) -> None:
        if self.placing not in PLACINGS:
            raise ValueError(f"placing is one of {', '.join(PLACINGS)}; got {self.placing!r}")
        make_policy(self.policy)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.policy}{', backfill' if self.backfill else ''}, {self.placing}"

    def scheduler(self, cluster: GpuCluster) -> GangScheduler:
        """One that has no job yet."""
        policy = make_policy(self.policy)
        if self.placing == "first fit":
            return GangScheduler(cluster, policy, self.backfill, place=first_fit)
        kinds = {
            "best fit": GangScheduler,
            "moves": DefragmentingScheduler,
            "consolidating": ConsolidatingScheduler,
        }
        return kinds[self.placing](cluster, policy, self.backfill)


class ComparedRun(NamedTuple):
    """What a scheduler made of the trace; shares are of all GPU-seconds, waits are seconds to the first start.

    Args:
        name: of the scheduler.
        utilisation: share that jobs had.
        goodput: share that was work that counts.
        idle_wanted: share that was free while somebody waited.
        median_wait: of all jobs that started.
        p90_wait: 90 % waited no longer.
        mean_wait: of all jobs that started.
        fairness: Jain's index over tenants of the mean slowdown.
        makespan: seconds.
        moves: of jobs.
        free: GPUs, averaged over time.
        largest: gangs that would fit, averaged over time.
        run: all of it.
    """

    name: str
    utilisation: float
    goodput: float
    idle_wanted: float
    median_wait: float
    p90_wait: float
    mean_wait: float
    fairness: float
    makespan: float
    moves: int
    free: float
    largest: LargestGangs
    run: SimulatedRun


def compare_schedulers(
    trace: Sequence[TracedJob],
    cluster: GpuCluster,
    compared: Iterable[ComparedScheduler],
    failures: Callable[[], Iterable[HostFailure]] = tuple,
    until: float = math.inf,
    after: float = 0.0,
    progress: bool = False,
) -> list[ComparedRun]:
    """Simulate one trace with each scheduler.

    Args:
        trace: the jobs.
        cluster: whose GPUs.
        compared: the schedulers.
        failures: called for each; makes the same failures each time.
        until: the clock stops then; never if left out.
        after: the time from which the largest gangs are averaged.
        progress: show a bar for each.
    """
    rows = []
    for each in compared:
        run = simulate_cluster(trace, each.scheduler(cluster), failures(), until, progress=progress)
        run.check_invariants()
        rows.append(_row(each.name, run, after))
    return rows


def _row(name: str, run: SimulatedRun, after: float) -> ComparedRun:
    waits = run.first_waits() or [0.0]
    timed = run.instants and max(after, run.instants[0].now) < run.span
    free, largest = run.mean_free(after) if timed else (0.0, LargestGangs(0, 0, 0, 0))
    return ComparedRun(
        name=name,
        utilisation=run.utilisation,
        goodput=run.goodput,
        idle_wanted=run.seconds.idle_wanted / run.capacity if run.capacity else 0.0,
        median_wait=quantile(waits, 0.5),
        p90_wait=quantile(waits, 0.9),
        mean_wait=sum(waits) / len(waits),
        fairness=run.fairness_of_slowdown,
        makespan=run.makespan,
        moves=sum(job.moves for job in run.jobs),
        free=free,
        largest=largest,
        run=run,
    )
