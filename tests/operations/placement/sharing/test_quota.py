"""Quotas: what may be borrowed, against a closed form counted GPU by GPU, and what contradicts itself."""

import math
import random

import numpy as np
import pytest

from minilib.mechanisms.scheduling import UnknownTenant
from minilib.operations.placement.sharing.accounting import UsageTimeline
from minilib.operations.placement.sharing.quota import InvalidQuota, QuotaInUse, Quotas, TenantQuota, TenantUse


def three() -> Quotas:
    return Quotas({"a": TenantQuota(8, "x"), "b": TenantQuota(8, "x", lending_limit=4), "c": TenantQuota(4)}, 24)


def test_a_tenant_has_its_own_and_what_its_cohort_lends():
    quotas = three()
    assert [quotas.available(tenant) for tenant in "abc"] == [12, 16, 4]
    assert [quotas.ceiling(tenant) for tenant in "abc"] == [12, 16, 4]
    quotas.take("a", 10)
    assert [quotas.available(tenant) for tenant in "abc"] == [2, 6, 4]
    quotas.take("b", 6)
    assert [quotas.available(tenant) for tenant in "abc"] == [0, 0, 4]
    assert not quotas.entitled("a", 1) and quotas.entitled("b", 2) and not quotas.entitled("b", 3)
    assert quotas.use() == [TenantUse("a", 8, 10, 2, 0), TenantUse("b", 8, 6, 0, 2), TenantUse("c", 4, 0, 0, 0)]
    with pytest.raises(InvalidQuota, match="may have 0 GPUs more, and takes 1: 1 too many"):
        quotas.take("a", 1)
    with pytest.raises(InvalidQuota, match="has 6 GPUs, and gives back 7"):
        quotas.give_back("b", 7)
    quotas.check_invariants()


def may_have(quotas, used, tenant, more):
    """Whether everybody's GPUs can be drawn from pools: each has its guaranteed ones, then the cohort's pool."""
    after = used | {tenant: used[tenant] + more}
    cohort = [name for name, quota in quotas.items() if quota.cohort and quota.cohort == quotas[tenant].cohort]
    if not cohort:
        return after[tenant] <= quotas[tenant].nominal
    limit = quotas[tenant].borrowing_limit
    if limit is not None and after[tenant] > quotas[tenant].nominal + limit:
        return False
    lent = {name: quotas[name].nominal if quotas[name].lending_limit is None else quotas[name].lending_limit
            for name in cohort}  # fmt: skip
    pool = sum(lent.values())
    for name in cohort:
        private = quotas[name].nominal - lent[name]
        for _ in range(after[name]):
            private, pool = (private - 1, pool) if private else (0, pool - 1)
    return pool >= 0


@pytest.mark.parametrize("seed", range(30))
def test_what_is_available_is_the_most_that_can_be_drawn(seed):
    choices = random.Random(seed)
    quotas = {}
    for tenant in "abcde"[: choices.randint(1, 5)]:
        nominal, cohort = choices.randint(0, 6), choices.choice(("x", "x", "y", ""))
        limits = {"borrowing_limit": choices.choice((None, 0, 2)),
                  "lending_limit": choices.choice((None, nominal // 2))} if cohort else {}  # fmt: skip
        quotas[tenant] = TenantQuota(nominal, cohort, **limits)
    counted, used = Quotas(quotas, 100), dict.fromkeys(quotas, 0)
    for _ in range(60):
        tenant = choices.choice(list(quotas))
        most = max((n for n in range(32) if may_have(quotas, used, tenant, n)), default=0)
        assert max(0, counted.available(tenant)) == most
        assert sum(used.values()) > 0 or counted.ceiling(tenant) == most
        gpus = choices.randint(0, most)
        counted.take(tenant, gpus)
        used[tenant] += gpus
        other = choices.choice(list(quotas))
        back = choices.randint(0, used[other])
        counted.give_back(other, back)
        used[other] -= back
        assert {each.tenant: each.used for each in counted.use()} == used
        counted.check_invariants()


def test_a_quota_below_what_runs():
    quotas = three()
    quotas.take("a", 10)
    quotas.take("b", 6)
    before = quotas.use()
    with pytest.raises(QuotaInUse, match="cohort 'x' has lent 1 GPUs more than it can; finish or preempt"):
        quotas.change("b", TenantQuota(8, "x", lending_limit=1))
    with pytest.raises(QuotaInUse, match="'a' has 10 GPUs, 1 more than it may"):
        quotas.change("a", TenantQuota(8, "x", borrowing_limit=1))
    with pytest.raises(QuotaInUse, match="'a' has 10 GPUs, 2 more than it may"):
        quotas.change("a", TenantQuota(8))
    with pytest.raises(QuotaInUse, match="cohort 'x' has lent 2 GPUs"):
        quotas.change("b", TenantQuota(8, "y"))  # the lender leaves for another cohort
    with pytest.raises(QuotaInUse, match="'b' has 6 GPUs; finish"):
        quotas.remove("b")
    assert quotas.use() == before
    quotas.change("b", TenantQuota(9, "x"))
    quotas.change("a", TenantQuota(7, "x", borrowing_limit=3))
    quotas.check_invariants()


def test_a_lender_stays_as_long_as_its_gpus_are_borrowed():
    quotas = Quotas({"a": TenantQuota(0, "x"), "b": TenantQuota(4, "x")}, 4)
    quotas.take("a", 3)
    with pytest.raises(QuotaInUse, match="without 'b' cohort 'x' has lent 3 GPUs"):
        quotas.remove("b")
    quotas.give_back("a", 3)
    quotas.remove("b")
    quotas.remove("a")
    assert quotas.tenants == [] and quotas.use() == []
    quotas.check_invariants()
    quotas.change("new", TenantQuota(4))
    assert quotas.available("new") == 4


def test_no_tenant_and_quota_0():
    assert Quotas({}, 8).use() == []
    quotas = Quotas({"a": TenantQuota(0)}, 8)
    assert quotas.available("a") == quotas.ceiling("a") == 0
    for asked in (quotas.available, quotas.used, quotas.ceiling, quotas.cohort, quotas.remove):
        with pytest.raises(UnknownTenant, match="'z' has no quota; those with one: 'a'"):
            asked("z")


@pytest.mark.parametrize("number", (-1, 1.5, math.nan, "4", True, None))
def test_what_is_no_number_of_gpus(number):
    with pytest.raises(InvalidQuota, match="nominal is a whole number"):
        TenantQuota(number)
    if number is not None:
        for limit in ("borrowing_limit", "lending_limit"):
            with pytest.raises(InvalidQuota, match=f"{limit} is a whole number"):
                TenantQuota(4, "x", **{limit: number})


def test_quotas_that_contradict_themselves():
    with pytest.raises(InvalidQuota, match="name one, or leave out borrowing_limit=4"):
        TenantQuota(4, borrowing_limit=4)
    with pytest.raises(InvalidQuota, match="at most nominal = 4, got 5"):
        TenantQuota(4, "x", lending_limit=5)
    with pytest.raises(InvalidQuota, match="9 GPUs in all, and the cluster has 8: 1 too many"):
        Quotas({"a": TenantQuota(4), "b": TenantQuota(5)}, 8)
    quotas = Quotas({"a": TenantQuota(4)}, 8)
    with pytest.raises(InvalidQuota, match="1 too many"):
        quotas.change("b", TenantQuota(5))
    assert quotas.tenants == ["a"]


def test_a_timeline_counts_gpu_seconds():
    quotas, timeline = three(), UsageTimeline()
    assert timeline.gpu_seconds("a", 5) == (0, 0) and timeline.series("a") == []
    timeline.note(0, quotas)
    quotas.take("a", 10)
    timeline.note(2, quotas)
    timeline.note(3, quotas)  # nothing changed
    quotas.give_back("a", 4)
    timeline.note(5, quotas)
    quotas.give_back("a", 1)
    timeline.note(5, quotas)
    assert timeline.times == [0, 2, 5]
    assert [(use.entitled, use.used, use.borrowed) for use in timeline.series("a")] == [
        (8, 0, 0),
        (8, 10, 2),
        (8, 5, 0),
    ]
    assert timeline.gpu_seconds("a", 7) == (3 * 10 + 2 * 5, 3 * 2)
    assert timeline.gpu_seconds("nobody", 7) == (0, 0)
    for late in (4, math.nan):
        with pytest.raises(ValueError, match="no earlier"):
            timeline.gpu_seconds("a", late)
        with pytest.raises(ValueError, match="in order"):
            timeline.note(late, quotas)


def test_numbers_of_numpy_and_numbers_that_are_none():
    with pytest.raises(InvalidQuota, match="300 GPUs"):
        Quotas({"a": TenantQuota(np.uint8(200)), "b": TenantQuota(np.uint8(100))}, 50)
    for gpus in (-1, 1.5, True, math.nan):
        quotas = Quotas({"a": TenantQuota(8)}, 16)
        for change in (quotas.take, quotas.give_back):
            with pytest.raises(InvalidQuota):
                change("a", gpus)
        assert quotas.used("a") == 0


def test_a_time_at_which_nothing_changed_is_not_noted():
    quotas, timeline = Quotas({"a": TenantQuota(8)}, 16), UsageTimeline()
    for now, gpus in ((0, 0), (1, 1), (1, -1)):
        (quotas.take if gpus >= 0 else quotas.give_back)("a", abs(gpus))
        timeline.note(now, quotas)
    assert timeline.times == [0]
