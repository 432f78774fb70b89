"""Jobs are moved ahead of need, so that one unit keeps room for a gang that is still to come.

`DefragmentingScheduler` moves when a gang waits; this one moves when nobody does, and never spends more on it than a
share of all GPU-seconds. One unit, that which has most free GPUs, is kept empty as far as can be:

    place    a job goes elsewhere as long as it fits elsewhere
    clear    host after host of the unit, the cheapest first: all jobs with a GPU there go elsewhere, or stay
    pack     the same for hosts elsewhere that are used in part, so that whole hosts take what the unit still holds

Where jobs go matters less than it seems: without moves, no placement that was tried keeps a unit much emptier than
first fit does, which fills units in one order and so leaves the last one empty.

KAI's consolidation does the like; https://github.com/NVIDIA/KAI-Scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from minilib.mechanisms.basics.checks import check_quantity
from minilib.mechanisms.scheduling import SchedulingPolicy
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import GpuCluster, HostGroup
from minilib.operations.placement.gangs.fitting import best_placement
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.defragmentation import move_cost

HELD = ("kept free",)  # an owner that no job can be, since their names are strings
AHEAD = 2  # hosts by which another unit must be emptier to be the one that is kept


class ConsolidatingScheduler(GangScheduler):
    """A gang scheduler that keeps one unit as empty as can be, and moves jobs out of it while nobody waits.

    Args:
        cluster, policy, backfill, depth: as GangScheduler has them.
        share: of all GPU-seconds since 0, which restarts of moved jobs take at most.
        every: seconds between two times at which hosts are cleared, at least.

    Attributes:
        spent: GPU-seconds of these restarts.

    Raises:
        ValueError: if share or every is no finite number ≥ 0.
    """

    def __init__(
        self,
        cluster: GpuCluster,
        policy: SchedulingPolicy | None = None,
        backfill: bool = True,
        depth: int = 100,
        share: float = 0.005,
        every: float = 600,
    ) -> None:
        check_quantity("share", share)
        check_quantity("every", every)
        super().__init__(cluster, policy, backfill, depth, place=self._beside_the_kept)
        self.share, self.every = share, every
        self.spent = self._next = 0.0
        self._kept = cluster.groups("unit")[0]

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now; if nobody waits then, clear and pack hosts."""
        due = now >= self._next
        if due:
            self._kept = self._emptiest()
        started = super().start(now)
        if due and not len(self.policy):
            self._next = now + self.every
            self._clear_the_kept(now)
            if self._pack(now):
                self._clear_the_kept(now)
        return started

    def _beside_the_kept(self, job: GangJob, free: FreeGpus) -> GangPlacement | None:
        """The best placement outside the unit that is kept, or else anywhere."""
        if kept := [gpu for gpu in self._kept.gpus if free.is_free(gpu)]:
            free.take(HELD, kept)
            placement = best_placement(job, free)
            free.give_back(HELD)
            if placement is not None:
                return placement
        return best_placement(job, free)

    def _emptiest(self) -> HostGroup:
        """The unit with most free GPUs; the one that was kept as long as no other has clearly more."""
        free, ahead = self._free_by_host(), AHEAD * self.cluster.largest_host
        return max(
            self.cluster.groups("unit"),
            key=lambda unit: sum(free[host] for host in unit.hosts) + ahead * (unit is self._kept),
        )

    def _clear_the_kept(self, now: float) -> None:
        self._clear(self._kept.hosts, lambda host: self._kept.gpus, now)

    def _pack(self, now: float) -> bool:
        """Empty hosts outside the unit into others that are used in part; whether a job was moved."""
        outside = [host for host in range(len(self.cluster.hosts)) if host not in self._kept.hosts]
        before = self._free_by_host()

        def closed(host: int) -> list[int]:
            free = self._free_by_host()
            empty = (each for each in outside if free[each] == len(self.cluster.gpus_of(each)))
            return [*self._kept.gpus, *self.cluster.gpus_of(host), *(g for h in empty for g in self.cluster.gpus_of(h))]

        return self._clear([host for host in outside if before[host]], closed, now)

    def _clear(self, hosts: Iterable[int], closed: Callable[[int], Iterable[int]], now: float) -> bool:
        """Move all jobs of each host off GPUs that are closed to them, if that is worth it and is not too dear."""
        before = self.spent
        costs = {host: cost for host in hosts if (cost := self._cost_of_clearing(host, now)) is not None}
        for host in sorted(costs, key=costs.__getitem__):
            cost = self._cost_of_clearing(host, now)  # a job that was moved may have left, or come here
            if cost == costs[host] and self.spent + cost <= self.share * self.cluster.gpus * now:
                for step in self._elsewhere(host, frozenset(closed(host))):
                    self.move(step)
                    self.spent += move_cost(step.job)
        return self.spent > before

    def _cost_of_clearing(self, host: int, now: float) -> float | None:
        """GPU-seconds of restarts; None if no job is there, or one keeps nothing or ends soon anyway."""
        entries = [self._entries[name] for name in self._on(host)]
        worth = all(
            each.job.checkpoint_every is not None and each.end - now > 2 * each.job.restart_seconds for each in entries
        )
        return sum(move_cost(each.job) for each in entries) if entries and worth else None

    def _elsewhere(self, host: int, closed: frozenset[int]) -> list[GangPlacement]:
        """Where the jobs of a host go, in an order in which each finds its GPUs free; nothing if one has no room."""
        trial, found = self.free.scratch(Fit()), []
        trial.take(HELD, [gpu for gpu in closed if trial.is_free(gpu)])
        for job in sorted((self._entries[name].job for name in self._on(host)), key=lambda job: -job.gpus):
            trial.take((HELD, job.name), [gpu for gpu in trial.give_back(job.name) if gpu in closed])
            if (target := best_placement(job, trial)) is None:
                return []
            trial.take(job.name, target.gpus)
            found.append(target)
        return found

    def _on(self, host: int) -> list[str]:
        owners = dict.fromkeys(self.free.owner(gpu) for gpu in self.cluster.gpus_of(host))
        return [name for name in owners if name in self._entries]

    def _free_by_host(self) -> Sequence[int]:
        return self.free.index(Fit()).capacity["host"]
