"""20,000 operations on a cluster: no GPU twice, no gang in part, and every job starts or is refused with a reason."""

import random
from dataclasses import replace

import pytest

from minilib.mechanisms.scheduling import AgedPriority, FairShare, FirstComeFirstServed, ShortestRemaining
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.ranks.mesh_shape import MeshShape
from tests.operations.placement.lost_gpus import lose_or_restore

CLUSTERS = (
    GpuCluster.regular(3, 4, 8),
    GpuCluster.regular(2, 6, 4, nvlink_domain=24, gpu="gb200"),
    GpuCluster.regular(4, 2, 4, racks_per_unit=2),
    GpuCluster.regular(1, 1, 8),
)
POLICIES = (FirstComeFirstServed, AgedPriority, FairShare, ShortestRemaining)
OPERATIONS = 5_200


def some_job(name: str, choices: random.Random) -> GangJob:
    tp = choices.choice((1, 1, 2, 4, 8))
    dp = choices.choice((1, 1, 2, 3, 4, 8))
    mesh = MeshShape.of(dp=dp, tp=tp) if choices.random() < 0.7 else None
    return GangJob(
        name, dp * tp, gpus_per_host=choices.choice((None, None, tp)), mesh=mesh, seconds=choices.randint(1, 50),
        tenant=choices.choice("ab"), priority=choices.randrange(3), min_gpus=1,
        anywhere=mesh is None and choices.random() < 0.3,
    )  # fmt: skip


@pytest.mark.parametrize("which", range(4))
def test_nothing_is_given_twice_and_everybody_starts_or_is_refused(which):
    choices, cluster = random.Random(which), CLUSTERS[which]
    scheduler, counted = GangScheduler(cluster, POLICIES[which]()), {}
    submitted, ran, out = set(), set(), set()
    for step in range(OPERATIONS):
        now, running = float(step), list(scheduler.running)
        operation = choices.choices(
            ("submit", "finish", "fail", "drain", "restore", "preempt", "resize", "cancel"), (30, 30, 3, 2, 8, 5, 8, 1)
        )[0]
        if operation == "submit":
            submitted.add(f"job{step}")
            refused = scheduler.submit(some_job(f"job{step}", choices), now)
            assert refused is None or "too many" in refused.reason
        elif operation in ("fail", "drain") or (operation == "restore" and out):
            lose_or_restore(operation, scheduler, out, choices, now)
        elif operation == "cancel" and scheduler.waiting:
            name = choices.choice(scheduler.waiting).name
            scheduler.finish(name, now)
            ran.add(name)
        elif operation == "resize" and (running or scheduler.waiting):
            job = choices.choice([*scheduler.waiting, *(p.job for p in scheduler.running.values())])
            other = some_job(job.name, choices)
            scheduler.resize(replace(other, tenant=job.tenant, priority=job.priority), now)
        elif operation in ("finish", "preempt") and running:
            name = choices.choice(running)
            if operation == "finish":
                scheduler.finish(name, now)
            else:
                scheduler.preempt(name, now)
        counted[operation] = counted.get(operation, 0) + 1
        ran |= {placement.job.name for placement in scheduler.start(now)}
        if step % 4 == 0:
            scheduler.check_invariants()
    scheduler.restore(range(cluster.gpus))
    for step in range(OPERATIONS, 10 * OPERATIONS):  # nothing else comes: everybody who waits starts
        ran |= {placement.job.name for placement in scheduler.start(float(step))}
        if not scheduler.running:
            break
        for name in list(scheduler.running):
            scheduler.finish(name, float(step))
    scheduler.check_invariants()
    assert not scheduler.waiting and not scheduler.running and scheduler.free.free == cluster.gpus
    assert submitted == ran | scheduler.refused.keys() and not ran & scheduler.refused.keys()
    assert sum(counted.values()) * len(CLUSTERS) >= 20_000 and min(counted.values()) > 20 and len(ran) > 500
