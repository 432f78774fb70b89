"""Where a replica goes: to the rack that has the fewest of its service, there to the domain and the hosts that have.

    gang       near, fewest groups: what it waits for is the slowest message
    replica    away from its siblings: what it waits for is nobody, and what is lost with a rack is to be little

Losing one of r racks that had room then takes at most ⌈n / r⌉ of n replicas. Among racks with as few, the domain with
least to give is taken, so that large holes stay large.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import HostGroup
from minilib.operations.placement.gangs.fitting import best_placement
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.rank_order import in_rank_order
from minilib.operations.placement.replicas.replica_set import ReplicaJob


class SpreadPlacement:
    """Says where jobs go: replicas apart, gangs as `best_placement` does. For `GangScheduler(…, place=…)`.

    Attributes:
        names: of the replicas of each service, waiting or running; whoever adds replicas keeps it.

    Cost: a look at each host for a replica.
    """

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def __call__(self, job: GangJob, free: FreeGpus) -> GangPlacement | None:
        """Where a job goes if it starts now; None if it does not fit."""
        if not isinstance(job, ReplicaJob):
            return best_placement(job, free)
        siblings = self.siblings(job, free)
        fit = Fit(job.on_one_host(free.cluster.largest_host), 1, tuple(sorted(job.selector.items())))
        capacity = free.index(fit).capacity["host"]
        domains = list(self._domains(job, free, siblings, capacity))
        if not domains:
            return None
        _, domain = min(domains, key=lambda found: found[0])
        return in_rank_order(job, _within(job, domain, free, siblings["host"], capacity))

    def siblings(self, job: ReplicaJob, free: FreeGpus) -> dict[str, Counter[int]]:
        """How many other replicas of a service each host, domain and group that they are spread over has."""
        found: dict[str, Counter[int]] = {level: Counter() for level in ("host", "domain", job.spread_over)}
        for name in self.names.get(job.service, set()) - {job.name}:
            for level, counts in found.items():
                counts.update(set(free.cluster.numbers_of(level, free.owned(name))))
        return found

    def _domains(
        self, job: ReplicaJob, free: FreeGpus, siblings: dict[str, Counter[int]], capacity: list[int]
    ) -> Iterator[tuple[tuple[int, ...], HostGroup]]:
        """Domains that have room, each with what speaks against it."""
        cluster = free.cluster
        for domain in cluster.groups("domain"):
            room = sum(capacity[host] for host in domain.hosts)
            if room < job.gpus:
                continue
            whole = [host for host in domain.hosts if capacity[host] >= job.gpus]
            beside = min((siblings["host"][host] for host in whole or domain.hosts if capacity[host]), default=0)
            groups = {cluster.group_number(job.spread_over, host) for host in domain.hosts}
            if job.spread_over == "host":
                groups = set(_hosts_within(job, domain, siblings["host"], capacity))
            together = max(siblings[job.spread_over][group] for group in groups)
            if job.most_together is None or together < job.most_together:
                yield (together, siblings["domain"][domain.number], beside, room, domain.number), domain


def _within(
    job: ReplicaJob, domain: HostGroup, free: FreeGpus, siblings: Counter[int], capacity: list[int]
) -> list[int]:
    """GPUs of a domain that has room: of one host, if one has room, that has few siblings and little to give."""
    found: list[int] = []
    for host in _hosts_within(job, domain, siblings, capacity):
        found += free.free_on(host)[: min(capacity[host], job.gpus - len(found))]
    return found


def _hosts_within(job: ReplicaJob, domain: HostGroup, siblings: Counter[int], capacity: list[int]) -> list[int]:
    """The hosts of these GPUs."""
    if whole := [host for host in domain.hosts if capacity[host] >= job.gpus]:
        return [min(whole, key=lambda host: (siblings[host], capacity[host]))]
    left, found = job.gpus, []
    for host in sorted(filter(capacity.__getitem__, domain.hosts), key=lambda host: (siblings[host], -capacity[host])):
        if left > 0:
            found.append(host)
        left -= capacity[host]
    return found
