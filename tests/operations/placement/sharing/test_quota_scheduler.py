"""Tenants within their quotas: refused, changed, gone, resized, and the shares that order them."""

import math

import pytest

from minilib.mechanisms.scheduling import (
    InvalidDemand,
    InvalidWeight,
    UnknownTenant,
)
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, InvalidJob
from minilib.operations.placement.gangs.scheduler import UnknownJob
from minilib.operations.placement.sharing.quota import InvalidQuota, QuotaInUse, TenantQuota
from minilib.operations.placement.sharing.scheduler import TenantScheduler
from tests.operations.placement.sharing.two_tenants import HALVES, TWO_HOSTS, job, starts


def test_refused_with_the_reason_and_by_how_much():
    scheduler = TenantScheduler(TWO_HOSTS, {"a": TenantQuota(4, "x", borrowing_limit=2), "b": TenantQuota(8, "x")})
    assert scheduler.submit(job("a1", 6), 0) is None
    refused = scheduler.submit(job("a2", 8), 0)
    assert refused.reason == ("a2 needs 8 GPUs, and tenant 'a' has a nominal quota of 4, and may borrow 2: 2 too many")
    assert "none of 2 hosts has that" in scheduler.submit(job("b1", 8, selector={"zone": "z"}), 0).reason
    with pytest.raises(UnknownTenant, match="'z' has no quota"):
        scheduler.submit(job("z", 1), 0)
    with pytest.raises(InvalidJob, match="whole number ≥ 1, got 1.5"):
        job("a3", 1.5)
    with pytest.raises(UnknownJob):
        scheduler.why_waits("nobody")
    assert scheduler.why_waits("a1").what == "turn"  # `start` has not looked at it
    scheduler.check_invariants()


def test_a_quota_that_changes():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    starts(scheduler, 0, job("a1", 8), job("a2", 4), job("b1", 16))
    with pytest.raises(QuotaInUse, match="'b'.*cohort 'x' has lent 1 GPUs more"):
        scheduler.change_quota("b", TenantQuota(3, "x"), 1)
    with pytest.raises(InvalidQuota, match="4 too many"):
        scheduler.change_quota("b", TenantQuota(12, "x"), 1)
    refused = scheduler.change_quota("b", TenantQuota(4, "x"), 1)
    assert [each.job.name for each in refused] == ["b1"] and "may borrow 8: 4 too many" in refused[0].reason
    assert scheduler.refused.keys() == {"b1"} and not scheduler.waiting
    scheduler.check_invariants()
    scheduler.change_quota("c", TenantQuota(4), 2)
    assert starts(scheduler, 2, job("c1", 4)) == ["c1"]


def test_a_tenant_that_leaves():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    starts(scheduler, 0, job("a1", 4), job("b1", 4))
    starts(scheduler, 0, job("b2", 16))
    with pytest.raises(QuotaInUse, match="1 jobs of tenant 'a' are here, 'a1' among them"):
        scheduler.remove_tenant("a", 1)
    scheduler.finish("a1", 1)
    assert [each.job.name for each in scheduler.remove_tenant("a", 1)] == ["b2"]
    with pytest.raises(UnknownTenant):
        scheduler.remove_tenant("a", 1)
    with pytest.raises(UnknownTenant):
        scheduler.submit(job("a2", 1), 2)
    scheduler.check_invariants()


def test_resizing_stays_within_the_quota():
    scheduler = TenantScheduler(TWO_HOSTS, {"a": TenantQuota(6), "b": TenantQuota(8)})
    starts(scheduler, 0, job("a1", 4, min_gpus=1))
    assert "grows by 3 GPUs, and tenant 'a' may have 2 more: 1 too many" in scheduler.resize(job("a1", 7), 1).reason
    assert isinstance(scheduler.resize(job("a1", 6, min_gpus=1), 2), GangPlacement)
    assert scheduler.quotas.used("a") == 6
    assert isinstance(scheduler.resize(job("a1", 2), 3), GangPlacement) and scheduler.quotas.used("a") == 2
    with pytest.raises(InvalidJob, match="of tenant 'a', and not of 'b'"):
        scheduler.resize(job("a1", 2, tenant="b"), 4)
    scheduler.check_invariants()


def test_dominant_shares_count_what_jobs_take_beside_gpus():
    quotas = {"a": TenantQuota(0, "x"), "b": TenantQuota(0, "x"), "pool": TenantQuota(9, "x")}
    nine = GpuCluster.regular(1, 9, 1)
    scheduler = TenantScheduler(nine, quotas, resources={"memory": 18})
    for number in range(5):
        scheduler.submit(job(f"a{number}", 1, resources={"memory": 4}), number)
        scheduler.submit(job(f"b{number}", 3, resources={"memory": 1}), number)
    scheduler.start(5)
    assert sorted(scheduler.running) == ["a0", "a1", "a2", "b0", "b1"]  # the example of the paper
    assert scheduler.use("a") == {"gpus": 3, "memory": 12} and scheduler.use("b") == {"gpus": 6, "memory": 2}
    scheduler.finish("a0", 6)
    assert scheduler.use("a") == {"gpus": 2, "memory": 8}
    with pytest.raises(InvalidDemand, match="takes 'cpus', and the cluster has gpus, memory"):
        scheduler.submit(job("a9", 1, resources={"cpus": 1}), 7)
    for amount in (-1, math.nan, math.inf):
        with pytest.raises(InvalidJob, match="memory="):
            job("a9", 1, resources={"memory": amount})


def test_weights_and_nobody():
    for weight in (0, -1, math.nan):
        with pytest.raises(InvalidWeight, match="'a'"):
            TenantScheduler(TWO_HOSTS, HALVES, weights={"a": weight, "b": 1})
    scheduler = TenantScheduler(TWO_HOSTS, {})
    assert scheduler.start(0) == []
    with pytest.raises(UnknownTenant, match="those with one: nobody"):
        scheduler.submit(job("a1", 1), 0)
    quotas = {"a": TenantQuota(0, "x"), "b": TenantQuota(0, "x"), "pool": TenantQuota(12, "x")}
    scheduler = TenantScheduler(TWO_HOSTS, quotas, weights={"a": 2, "b": 1, "pool": 1})
    for number in range(12):
        scheduler.submit(job(f"b{number}", 1), number)
        scheduler.submit(job(f"a{number}", 1), number)
    scheduler.start(12)
    assert [scheduler.quotas.used(tenant) for tenant in "ab"] == [8, 4]


def test_parts_of_a_resource_come_back_exactly():
    scheduler = TenantScheduler(GpuCluster.regular(1, 1, 8), {"a": TenantQuota(8)}, resources={"cpus": 10})
    for cpus in (0.1, 0.2, 0.3, 0.7):
        scheduler.submit(GangJob(f"j{cpus}", 1, tenant="a", resources={"cpus": cpus}))
    scheduler.start(0)
    for cpus in (0.1, 0.2, 0.3, 0.7):
        scheduler.finish(f"j{cpus}", 1)
    assert not any(scheduler.use("a").values())
