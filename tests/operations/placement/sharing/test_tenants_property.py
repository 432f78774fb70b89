"""20,000 operations of several tenants: no GPU twice, nobody beyond its quota and what it borrows, everybody starts or
is refused with a reason or waits for a named one, and whoever gave way disturbs nobody whom it gave way to.
"""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from minilib.mechanisms.scheduling import AgedPriority, FairShare
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, Refused
from minilib.operations.placement.sharing.quota import InvalidQuota, QuotaInUse, TenantQuota
from minilib.operations.placement.sharing.refusing import WAITS_FOR
from minilib.operations.placement.sharing.scheduler import TenantScheduler
from minilib.ranks.mesh_shape import MeshShape
from tests.operations.placement.lost_gpus import lose_or_restore

CLUSTERS = (GpuCluster.regular(2, 4, 8), GpuCluster.regular(2, 4, 4, nvlink_domain=16, gpu="gb200"),
            GpuCluster.regular(3, 2, 4), GpuCluster.regular(1, 1, 8))  # fmt: skip
POLICIES = (None, lambda: AgedPriority(), lambda: FairShare(), None)
TENANTS = "abcd"
OPERATIONS = 5_100
CHANCES = {"submit": 28, "finish": 30, "fail": 3, "drain": 2, "restore": 8, "preempt": 4, "resize": 8, "cancel": 1,
           "quota": 6}  # fmt: skip


def some_quotas(cluster, choices):
    part = cluster.gpus // 4
    return {
        "a": TenantQuota(part, "x"),
        "b": TenantQuota(part + part // 2, "x", borrowing_limit=choices.choice((0, part)), lending_limit=part),
        "c": TenantQuota(0, "x"),
        "d": TenantQuota(part),
    }


def some_job(name, choices, tenant=None):
    tp, dp = choices.choice((1, 1, 2, 4)), choices.choice((1, 1, 2, 3, 4))
    mesh = MeshShape.of(dp=dp, tp=tp) if choices.random() < 0.6 else None
    return GangJob(
        name, dp * tp, mesh=mesh, seconds=choices.randint(1, 60), tenant=tenant or choices.choice(TENANTS),
        priority=choices.randrange(3), min_gpus=choices.choice((None, 1)), checkpoint_every=choices.choice((None, 5)),
        restart_seconds=choices.choice((0, 2)),
    )  # fmt: skip


def some_change(scheduler, choices, now):
    """Another quota of a tenant, or a named error that changes nothing."""
    tenant = choices.choice(TENANTS)
    before, uses = scheduler.quotas.quota(tenant), scheduler.quotas.use()
    nominal = choices.randint(0, 2 * before.nominal + 4)
    quota = replace(before, nominal=nominal, lending_limit=None if before.lending_limit is None else nominal // 2)
    try:
        refused = scheduler.change_quota(tenant, quota, now)
    except (QuotaInUse, InvalidQuota) as error:
        assert scheduler.quotas.quota(tenant) == before and scheduler.quotas.use() == uses
        assert re.search(r"\d+ (GPUs )?(too many|more than)", str(error))
        return type(error).__name__, []
    return "changed", refused


@pytest.mark.parametrize("which", range(4))
def test_nobody_has_more_than_it_may_and_everybody_starts_or_is_told_why_not(which):
    choices, cluster = random.Random(which), CLUSTERS[which]
    policy = POLICIES[which]
    scheduler = TenantScheduler(cluster, some_quotas(cluster, choices), policy() if policy else None)
    counted, submitted, ran, out = Counter(), set(), set(), set()
    for step in range(OPERATIONS):
        now, running = float(step), list(scheduler.running)
        operation = choices.choices(list(CHANCES), CHANCES.values())[0]
        if operation == "submit":
            submitted.add(f"job{step}")
            refused = scheduler.submit(some_job(f"job{step}", choices), now)
            assert refused is None or "too many" in refused.reason
        elif operation in ("fail", "drain") or (operation == "restore" and out):
            lose_or_restore(operation, scheduler, out, choices, now)
        elif operation == "cancel" and scheduler.waiting:
            ran.add(name := choices.choice(scheduler.waiting).name)
            scheduler.finish(name, now)
        elif operation == "resize" and (running or scheduler.waiting):
            job = choices.choice([*scheduler.waiting, *(p.job for p in scheduler.running.values())])
            answer = scheduler.resize(replace(some_job(job.name, choices, job.tenant), priority=job.priority), now)
            assert not isinstance(answer, Refused) or answer.reason
        elif operation in ("finish", "preempt") and running:
            getattr(scheduler, operation)(choices.choice(running), now)
        elif operation == "quota":
            kind, refused = some_change(scheduler, choices, now)
            counted[kind] += 1
            assert all("too many" in each.reason for each in refused)
        counted[operation] += 1
        started = {placement.job.name for placement in scheduler.start(now)}
        ran |= started
        for preemption in scheduler.preemptions:
            counted["preemptions"] += 1
            counted["shrunk"] += len(preemption.shrunk)
            counted["inexact"] += not preemption.exact
            ran.add(preemption.placement.job.name)
        if step % 4 == 0:
            scheduler.check_invariants()
            reasons = [scheduler.why_waits(job.name) for job in scheduler.waiting]
            assert all(reason.what in WAITS_FOR for reason in reasons)
            counted.update(reason.what for reason in reasons)
    scheduler.restore(range(cluster.gpus))
    for step in range(OPERATIONS, 10 * OPERATIONS):  # nothing else comes: everybody who waits starts
        ran |= {placement.job.name for placement in scheduler.start(float(step))}
        if not scheduler.running:
            break
        for name in list(scheduler.running):
            scheduler.finish(name, float(step))
    scheduler.check_invariants()
    assert not scheduler.waiting and not scheduler.running and scheduler.free.free == cluster.gpus
    assert submitted == ran | scheduler.refused.keys()
    assert sum(counted[operation] for operation in CHANCES) * len(CLUSTERS) >= 20_000
    assert counted["preemptions"] > 50
