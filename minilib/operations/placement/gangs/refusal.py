"""Why a job never starts on a cluster, whatever ends, is repaired or moves away: the constraint, and by how much."""

from __future__ import annotations

from collections.abc import Iterator

from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import fit_of
from minilib.operations.placement.gangs.job import GangJob, Refused


class Feasibility:
    """Which jobs a cluster could run if all of its GPUs were free.

    Args:
        cluster: the tree.
    """

    def __init__(self, cluster: GpuCluster) -> None:
        self.cluster = cluster
        self._most: dict[Fit, int] = {}

    def refusal(self, job: GangJob) -> Refused | None:
        """Why a job never starts; None if it starts some time."""
        fit = fit_of(job, self.cluster.largest_host)
        if self.most(fit) >= job.gpus:
            return None
        return Refused(job, next(reason for wrong, reason in self._objections(job, fit) if wrong))

    def most(self, fit: Fit) -> int:
        """GPUs that jobs of a fit could have together."""
        if fit not in self._most:
            hosts = [host.gpus // fit.on_host * fit.on_host * fit.meets(host.labels) for host in self.cluster.hosts]
            domains = (sum(hosts[host] for host in group.hosts) for group in self.cluster.groups("domain"))
            self._most[fit] = sum(gpus // fit.in_domain * fit.in_domain for gpus in domains)
        return self._most[fit]

    def _objections(self, job: GangJob, fit: Fit) -> Iterator[tuple[bool, str]]:
        """The widest constraint first, so that the sentence names the one that fails by itself."""
        cluster = self.cluster
        meeting = [host.gpus for host in cluster.hosts if fit.meets(host.labels)]
        wanted = ", ".join(f"{name}={value}" for name, value in fit.selector)
        yield job.gpus > cluster.gpus, self._beyond(job, job.gpus, cluster.gpus, f"{cluster.name} has")
        yield not meeting, f"{job.name} asks for hosts with {wanted}, and none of {len(cluster.hosts)} hosts has that"
        yield job.gpus > sum(meeting), self._beyond(job, job.gpus, sum(meeting), f"hosts with {wanted} have")
        host = max(meeting, default=0)
        yield (
            fit.on_host > host,
            self._beyond(job, fit.on_host, host, "the largest host has", "on one host for each worker"),
        )
        what = f"in one NVLink domain for each {'group of tp' if fit.in_domain == job.tp else 'segment'}"
        domain = cluster.largest_domain
        yield fit.in_domain > domain, self._beyond(job, fit.in_domain, domain, "the largest has", what)
        most = self.most(fit)
        together = f"{fit.on_host} on a host and {fit.in_domain} in a domain together"
        yield True, self._beyond(job, job.gpus, most, f"with {together} its hosts hold")

    @staticmethod
    def _beyond(job: GangJob, needed: int, there: int, has: str, what: str = "") -> str:
        wanted = f"{needed} GPUs {what}".strip()
        return f"{job.name} needs {wanted}, and {has} {there}: {needed - there} too many"
