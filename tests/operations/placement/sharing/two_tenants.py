"""Two hosts that two tenants own in halves, and gangs whose names begin with their tenant's."""

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.sharing.quota import TenantQuota

TWO_HOSTS = GpuCluster.regular(1, 2, 8)
HALVES = {"a": TenantQuota(8, "x"), "b": TenantQuota(8, "x")}


def job(name, gpus, tenant=None, **more):
    return GangJob(name, gpus, tenant=tenant or name[0], **more)


def starts(scheduler, now, *jobs):
    """Names of those that start."""
    for each in jobs:
        assert scheduler.submit(each, now) is None
    started = [placement.job.name for placement in scheduler.start(now)]
    scheduler.check_invariants()
    return started
