"""Which running jobs to move so that a gang that waits has room: those whose restarts cost the fewest GPU-seconds.

    12 GPUs are free, as 4 on each of three hosts; a gang wants a whole host of 8
    → the job of 4 on the first host moves to the second, and the gang takes the first

Sets of jobs are tried from the cheapest on, and the first that makes room is taken; a job is moved once at most. Steps
come in an order in which each one finds its GPUs free, so that no job is nowhere between two of them. Nothing is moved
that does not let the gang start.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.scheduling import SchedulingPolicy
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import best_placement, fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.scheduler import GangScheduler

GANG = ("the gang that gets room",)  # an owner that no job can be, since their names are strings


@dataclass(frozen=True)
class MovePlan:
    """Moves that make room for a gang.

    Args:
        placement: of the gang, after them.
        steps: where each moved job goes on, in order.
    """

    placement: GangPlacement
    steps: tuple[GangPlacement, ...] = ()

    @property
    def gpu_seconds(self) -> float:
        """What the restarts cost."""
        return sum(map(move_cost, (step.job for step in self.steps)))

    def apply(self, scheduler: GangScheduler) -> None:
        """Move the jobs; the gang is left to `start`."""
        for step in self.steps:
            scheduler.move(step)


def move_cost(job: GangJob) -> float:
    """GPU-seconds in which a job that moves does nothing; saving itself is free."""
    return job.gpus * job.restart_seconds


def plan_moves(
    gang: GangJob,
    free: FreeGpus,
    movable: Mapping[str, GangPlacement],
    live: bool = False,
    most_moves: int = 4,
    tries: int = 200,
) -> MovePlan | None:
    """The cheapest moves after which a gang fits.

    Args:
        gang: which waits.
        free: who has which GPU; nothing is changed.
        movable: jobs that may be moved, and where they run.
        live: a job goes on at its old place until it is ready at the new one, which shares no GPU with the old one;
            else it is stopped first, and may get some of its own GPUs again.
        most_moves: jobs that are moved at most.
        tries: sets of jobs that are looked at.

    Returns:
        None if no such moves were found, or the free GPUs are too few; no steps if the gang fits already.

    Raises:
        ValueError: if a number is no whole one ≥ 0.
    """
    check_whole("most_moves", most_moves)
    check_whole("tries", tries)
    if (placement := best_placement(gang, free)) is not None:
        return MovePlan(placement)
    if free.free < gang.gpus:
        return None
    fit = fit_of(gang, free.cluster.largest_host)
    trial = free.scratch(fit)
    jobs = sorted(movable.values(), key=lambda placed: (move_cost(placed.job), placed.job.name))
    for count, chosen in enumerate(_cheapest_first(jobs, most_moves)):
        if count == tries:
            return None
        for placed in chosen:
            trial.give_back(placed.job.name)
        room = trial.index(fit).total >= gang.gpus
        for placed in chosen:
            trial.take(placed.job.name, placed.gpus)
        if room and (plan := _plan(gang, free, chosen, live)) is not None:
            return plan
    return None


class DefragmentingScheduler(GangScheduler):
    """A gang scheduler that moves jobs for the first in line, if that costs less than what the gang gains.

    What it gains is its GPUs, from now until it would start by the estimates.

    Args:
        cluster, policy, backfill, depth: as GangScheduler has them.

    Attributes:
        plans: that were carried out.
    """

    def __init__(
        self, cluster: GpuCluster, policy: SchedulingPolicy | None = None, backfill: bool = True, depth: int = 100
    ) -> None:
        super().__init__(cluster, policy, backfill, depth)
        self.plans: list[MovePlan] = []

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now; then make room for the first in line."""
        started = super().start(now)
        first, kept = self.policy.first(), self.reservation
        if first is None or kept is None or kept.name != first.key:
            return started
        gang = self._entries[first.key].job
        if (plan := plan_moves(gang, self.free, self._worth_moving(now))) is None or not plan.steps:
            return started
        if plan.gpu_seconds >= gang.gpus * (kept.time - now):
            return started
        plan.apply(self)
        self.plans.append(plan)
        return started + super().start(now)

    def _worth_moving(self, now: float) -> dict[str, GangPlacement]:
        """Jobs that keep something when they stop, and do not end before they would have restarted."""
        return {
            name: entry.placement
            for name, entry in self._entries.items()
            if entry.placement is not None
            and entry.job.checkpoint_every is not None
            and entry.end - now > entry.job.restart_seconds
        }


def _cheapest_first(jobs: Sequence[GangPlacement], most: int) -> Iterator[tuple[GangPlacement, ...]]:
    """Sets of one job up to `most`, by their cost; jobs come in order of theirs."""
    costs = [move_cost(placed.job) for placed in jobs]
    heap = [(costs[0], 1, (0,))] if jobs and most else []
    while heap:
        cost, size, chosen = heapq.heappop(heap)
        yield tuple(jobs[at] for at in chosen)
        last = chosen[-1]
        if last + 1 < len(jobs):
            if size < most:
                heapq.heappush(heap, (cost + costs[last + 1], size + 1, (*chosen, last + 1)))
            heapq.heappush(heap, (cost - costs[last] + costs[last + 1], size, (*chosen[:-1], last + 1)))


def _plan(gang: GangJob, free: FreeGpus, chosen: Sequence[GangPlacement], live: bool) -> MovePlan | None:
    """New places for these jobs and the gang: the gang is placed first, or last."""
    by_size = sorted(chosen, key=lambda placed: -placed.job.gpus)
    for gang_first in (True, False):
        trial = free.scratch(fit_of(gang, free.cluster.largest_host))
        targets = _targets(gang, trial, by_size, gang_first)
        if targets is not None and (steps := _in_order(targets[1:], free, live)) is not None:
            return MovePlan(targets[0], steps)
    return None


def _targets(
    gang: GangJob, trial: FreeGpus, chosen: Sequence[GangPlacement], gang_first: bool
) -> list[GangPlacement] | None:
    """The gang's placement, then those of the jobs; None if one finds no room."""
    found = []
    if gang_first:
        for placed in chosen:
            trial.give_back(placed.job.name)
        if (placement := best_placement(gang, trial)) is None:
            return None
        trial.take(GANG, placement.gpus)
        found.append(placement)
    for placed in chosen:
        if (target := best_placement(placed.job, trial)) is None:
            return None
        if not gang_first:  # its own GPUs are not free yet: it goes elsewhere
            trial.give_back(placed.job.name)
        trial.take(placed.job.name, target.gpus)
        found.append(target)
    if not gang_first:
        if (placement := best_placement(gang, trial)) is None:
            return None
        found.insert(0, placement)
    return found


def _in_order(targets: Sequence[GangPlacement], free: FreeGpus, live: bool) -> tuple[GangPlacement, ...] | None:
    """The moves in an order in which each finds its GPUs free, or its own if it stops first; None if there is none."""
    trial, left, steps = free.scratch(Fit()), list(targets), []
    while left:
        step = next((target for target in left if _can_go(target, trial, live)), None)
        if step is None:
            return None
        trial.give_back(step.job.name)
        trial.take(step.job.name, step.gpus)
        left.remove(step)
        steps.append(step)
    return tuple(steps)


def _can_go(target: GangPlacement, free: FreeGpus, live: bool) -> bool:
    own = None if live else target.job.name
    return all(free.is_free(gpu) or (own and free.owner(gpu) == own and not free.out(gpu)) for gpu in target.gpus)
