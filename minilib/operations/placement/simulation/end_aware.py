"""Placement that looks at when jobs end: what ends together shares a host, so that whole hosts become free.

A short job on a host of long ones takes nothing from anybody; a long job beside short ones keeps the whole host from
gangs long after the others have gone. So a job that fits on one host goes where it prolongs the use of a host least,
among equals where least is free, and onto an empty host only if no other has room. Larger jobs are placed as
`best_placement` places them. All of it relies on estimates.

Source: Ling et al., "LAVA: Lifetime-Aware VM Allocation with Learned Distributions and Adaptation to Mispredictions",
MLSys 2025: virtual machines instead of jobs, and predictions instead of estimates.
"""

from __future__ import annotations

import math

from minilib.mechanisms.scheduling import SchedulingPolicy
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import best_placement, fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.rank_order import in_rank_order
from minilib.operations.placement.gangs.scheduler import GangScheduler

ALIKE = 60.0  # seconds; a use that is prolonged by less counts as one that is prolonged by a minute


class EndAwareScheduler(GangScheduler):
    """A gang scheduler that places jobs of one host by their ends.

    Args:
        cluster, policy, backfill, depth: as GangScheduler has them.
    """

    def __init__(
        self, cluster: GpuCluster, policy: SchedulingPolicy | None = None, backfill: bool = True, depth: int = 100
    ) -> None:
        super().__init__(cluster, policy, backfill, depth, place=self._by_ends)
        self._now = 0.0

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now."""
        self._now = now
        return super().start(now)

    def _by_ends(self, job: GangJob, free: FreeGpus) -> GangPlacement | None:
        fit = fit_of(job, self.cluster.largest_host)
        index = free.index(fit)
        if job.gpus > self.cluster.largest_host or fit.in_domain > self.cluster.largest_host or index.total < job.gpus:
            return best_placement(job, free)
        hosts = [host for host, gpus in enumerate(index.capacity["host"]) if gpus >= job.gpus]
        if not hosts:
            return best_placement(job, free)
        units = [0] * len(self.cluster.groups("unit"))
        for host, gpus in enumerate(index.capacity["host"]):
            units[self.cluster.group_number("unit", host)] += gpus
        best = min(hosts, key=lambda host: self._cost(job, host, free, units))
        return in_rank_order(job, free.free_on(best)[: job.gpus])

    def _cost(self, job: GangJob, host: int, free: FreeGpus, units: list[int]) -> tuple[float, ...]:
        """Smaller is better: whether the host is empty, by how much its use is prolonged, what is free beside it."""
        left = len(free.free_on(host))
        if left == len(self.cluster.gpus_of(host)):
            return (1, units[self.cluster.group_number("unit", host)], host)
        end, used_until = self._now + job.seconds, self._used_until(host, free)
        longer = math.frexp(1 + (end - used_until) / ALIKE)[1] if end > used_until else 0
        return (0, longer, left, abs(used_until - end), host)

    def _used_until(self, host: int, free: FreeGpus) -> float:
        """When the last job of a host ends, by the estimates."""
        owners = {free.owner(gpu) for gpu in self.cluster.gpus_of(host)}
        return max((self._entries[name].end for name in owners if name in self._entries), default=self._now)
