"""Why a tenant's gang waits, or never starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from minilib.mechanisms.scheduling import InvalidDemand
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, Refused
from minilib.operations.placement.gangs.refusal import Feasibility
from minilib.operations.placement.sharing.quota import Quotas

WAITS_FOR = ("quota", "gpus", "turn")


class WaitReason(NamedTuple):
    """Why a gang waits.

    Args:
        what: one of WAITS_FOR.
        sentence: that says by how much, or behind whom.
    """

    what: str
    sentence: str


class QuotaFeasibility(Feasibility):
    """Which jobs a cluster could run if all of its GPUs were free, and a tenant's cohort idle.

    Args:
        cluster: the tree.
        quotas: of its tenants.
    """

    def __init__(self, cluster: GpuCluster, quotas: Quotas) -> None:
        super().__init__(cluster)
        self.quotas = quotas

    def refusal(self, job: GangJob) -> Refused | None:
        """Why a job never starts; None if it starts some time."""
        most, own = self.quotas.ceiling(job.tenant), self.quotas.quota(job.tenant).nominal
        if job.gpus > most:
            what = f"a nominal quota of {own}, and may borrow {most - own}"
            return Refused(job, f"{job.name} needs {job.gpus} GPUs, and tenant {job.tenant!r} has {what}: "
                                f"{job.gpus - most} too many")  # fmt: skip
        return super().refusal(job)


def check_resources(job: GangJob, capacity: Mapping[str, float]) -> None:
    """Refuse a job that takes what its cluster does not have at all.

    Raises:
        InvalidDemand: which names it.
    """
    if unknown := [name for name in job.resources if name not in capacity]:
        raise InvalidDemand(f"{job.name} takes {unknown[0]!r}, and the cluster has {', '.join(capacity)}: say how much "
                            "it has in `resources`")  # fmt: skip
