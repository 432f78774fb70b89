"""Small jobs are moved ahead of need, so that one unit keeps room for a gang that is still to come.

`DefragmentingScheduler` moves when a gang waits; this one moves when nobody does, and never spends more on it than a
share of all GPU-seconds. Of the unit that has most free GPUs it clears host after host, those that cost least first:
all jobs of the host go elsewhere, where least is free, or stay.

KAI's consolidation does the like; https://github.com/NVIDIA/KAI-Scheduler.
"""

from __future__ import annotations

from minilib.mechanisms.basics.checks import check_quantity
from minilib.mechanisms.scheduling import SchedulingPolicy
from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import best_placement
from minilib.operations.placement.gangs.job import GangPlacement
from minilib.operations.placement.simulation.defragmentation import move_cost
from minilib.operations.placement.simulation.end_aware import EndAwareScheduler

HELD = ("kept free",)  # an owner that no job can be, since their names are strings


class ConsolidatingScheduler(EndAwareScheduler):
    """A gang scheduler that places by ends, and moves small jobs out of one unit while nobody waits.

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
        super().__init__(cluster, policy, backfill, depth)
        self.share, self.every = share, every
        self.spent = self._next = 0.0

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now; if nobody waits then, clear hosts."""
        started = super().start(now)
        if not len(self.policy) and now >= self._next:
            self._next = now + self.every
            self._consolidate(now)
        return started

    def _consolidate(self, now: float) -> None:
        free = [len(self.free.free_on(host)) for host in range(len(self.cluster.hosts))]
        unit = max(self.cluster.groups("unit"), key=lambda unit: sum(free[host] for host in unit.hosts))
        used = [host for host in unit.hosts if free[host] < len(self.cluster.gpus_of(host))]
        costs = {host: cost for host in used if (cost := self._cost_of_clearing(host, now)) is not None}
        for host in sorted(costs, key=costs.__getitem__):
            if self.spent + costs[host] > self.share * self.cluster.gpus * now:
                break
            for step in self._elsewhere(host, unit.gpus):
                self.move(step)
                self.spent += move_cost(step.job)

    def _cost_of_clearing(self, host: int, now: float) -> float | None:
        """GPU-seconds of restarts; None if a job there is larger than the host, keeps nothing, or ends soon anyway."""
        entries = [self._entries[name] for name in self._on(host)]
        for entry in entries:
            small = self.cluster.numbers_of("host", entry.placement.gpus) == [host] * entry.job.gpus
            worth = entry.job.checkpoint_every is not None and entry.end - now > 2 * entry.job.restart_seconds
            if not (small and worth):
                return None
        return sum(move_cost(entry.job) for entry in entries)

    def _elsewhere(self, host: int, unit: range) -> list[GangPlacement]:
        """Where the jobs of a host go outside its unit; nothing if one of them has no room there."""
        trial = self.free.scratch(Fit())
        trial.take(HELD, [gpu for gpu in unit if trial.is_free(gpu)])
        found = []
        for job in sorted((self._entries[name].job for name in self._on(host)), key=lambda job: -job.gpus):
            if (target := best_placement(job, trial)) is None:
                return []
            trial.give_back(job.name)
            trial.take((job.name,), target.gpus)
            found.append(target)
        return found

    def _on(self, host: int) -> list[str]:
        owners = dict.fromkeys(self.free.owner(gpu) for gpu in self.cluster.gpus_of(host))
        return [name for name in owners if name in self._entries]
