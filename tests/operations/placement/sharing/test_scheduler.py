"""Borrowing, reclaiming and preempting among tenants: closed cases, and traps that other schedulers fell into."""

import pytest

from minilib.mechanisms.scheduling import (
    AgedPriority,
    FirstComeFirstServed,
)
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.sharing.quota import TenantQuota
from minilib.operations.placement.sharing.scheduler import TenantScheduler
from tests.operations.placement.sharing.two_tenants import HALVES, TWO_HOSTS, job, starts


def victims(scheduler):
    return [(victim.name, victim.keeps) for preemption in scheduler.preemptions for victim in preemption.victims]


def test_a_tenant_borrows_what_others_leave_and_the_owner_reclaims_it():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    assert starts(scheduler, 0, job("a1", 8), job("a2", 4, checkpoint_every=100), job("a3", 4)) == ["a1", "a2", "a3"]
    assert [(each.used, each.borrowed, each.lendable) for each in scheduler.quotas.use()] == [(16, 8, 0), (0, 0, 8)]
    assert starts(scheduler, 250, job("b1", 4)) == ["b1"] and victims(scheduler) == [("a2", 0)]  # lost 50 s, not 250
    assert scheduler.preemptions[0].lost == 4 * 50
    assert scheduler.why_waits("a2").what == "quota"
    assert scheduler.why_waits("a2").sentence == "a2 needs 4 GPUs, 4 more than 'a' may have now"
    assert starts(scheduler, 300, job("b2", 4)) == ["b2"] and victims(scheduler) == [("a3", 0)]
    assert starts(scheduler, 300, job("b3", 1)) == [] and scheduler.why_waits("b3").what == "quota"
    scheduler.finish("b1", 400)
    assert starts(scheduler, 400) == ["b3"]  # within its quota, while a2 and a3 would borrow 4 of 3
    scheduler.finish("b2", 500)
    assert starts(scheduler, 500) == ["a2"]
    scheduler.finish("a1", 600)
    assert starts(scheduler, 600) == ["a3"]


def test_a_gang_starts_again_with_what_it_saved():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    starts(scheduler, 0, job("a1", 16, seconds=1_000, checkpoint_every=300, restart_seconds=50))
    assert starts(scheduler, 700, job("b1", 8, seconds=100)) == ["b1"]
    scheduler.finish("b1", 800)
    assert starts(scheduler, 800) == ["a1"]
    assert scheduler._ends() == [(800 + 1_000 - 600 + 50, "a1")]


def test_an_owner_is_not_reclaimed_from_and_a_borrower_reclaims_nothing():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    starts(scheduler, 0, job("a1", 8, priority=9), job("b1", 8, priority=9))
    assert starts(scheduler, 1, job("a2", 1, priority=9)) == [] and not scheduler.preemptions
    scheduler.finish("b1", 2)
    assert starts(scheduler, 2) == ["a2"]
    assert starts(scheduler, 3, job("b2", 8, priority=9)) == ["b2"] and victims(scheduler) == [("a2", 0)]
    assert starts(scheduler, 4, job("b3", 8, priority=0)) == ["b3"] and victims(scheduler) == [("b2", 0)]  # its own


def test_a_tenant_is_asked_only_as_long_as_it_borrows():
    """Both gangs of `a` would lose nothing; but after the first, `a` has what it owns, and less."""
    scheduler = TenantScheduler(TWO_HOSTS, HALVES | {"c": TenantQuota(0, "x")})
    starts(scheduler, 0, *(job(name, 5, checkpoint_every=1) for name in ("a1", "a2")), job("c1", 6))
    assert starts(scheduler, 10, job("b1", 6)) == ["b1"] and victims(scheduler) == [("c1", 0)]
    assert starts(scheduler, 20, job("b2", 2)) == ["b2"] and len(victims(scheduler)) == 1  # one of them: 10 is beyond 8
    assert scheduler.quotas.used("a") == 5


def test_a_gang_that_has_to_borrow_keeps_no_other_of_its_tenant_from_reclaiming():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    starts(scheduler, 0, job("b1", 8, checkpoint_every=1), job("b2", 8))
    assert starts(scheduler, 10, job("a_big", 12)) == [] and not scheduler.preemptions
    assert starts(scheduler, 11, job("a2", 8)) == ["a2"] and victims(scheduler) == [("b1", 0)]


def test_more_urgent_gangs_preempt_less_urgent_ones_of_their_tenant_alone():
    scheduler = TenantScheduler(TWO_HOSTS, {"a": TenantQuota(8), "b": TenantQuota(8)})
    starts(scheduler, 0, job("a1", 4, priority=5), job("a2", 4, priority=7), job("b1", 8, priority=9))
    assert starts(scheduler, 9, job("a3", 4, priority=7)) == []  # equals do not
    assert starts(scheduler, 10, job("a4", 8, priority=4)) == ["a4"]
    assert sorted(victims(scheduler)) == [("a1", 0), ("a2", 0)]
    assert set(scheduler.running) == {"a4", "b1"}


def test_a_gang_that_can_shrink_gives_only_what_is_needed():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    starts(scheduler, 0, job("a1", 16, min_gpus=8, restart_seconds=10, seconds=1_000))
    assert starts(scheduler, 100, job("b1", 6)) == ["b1"] and victims(scheduler) == [("a1", 10)]
    assert scheduler.running["a1"].job.gpus == 10 and scheduler.preemptions[0].lost == 160
    assert ((100 + 900 * 1.6 + 10), "a1") in scheduler._ends()
    assert starts(scheduler, 200, job("b2", 2)) == ["b2"] and scheduler.running["a1"].job.gpus == 8
    assert starts(scheduler, 300, job("b3", 1)) == [] and not scheduler.preemptions


def test_victims_are_chosen_where_the_gang_may_run():
    """Eight GPUs of borrowers that lie on two hosts make no room for a worker of eight."""
    cluster = GpuCluster.regular(1, 3, 8)
    scheduler = TenantScheduler(cluster, {"a": TenantQuota(8, "x"), "b": TenantQuota(16, "x")}, FirstComeFirstServed())
    starts(scheduler, 0, job("b1", 4), job("a1", 4, restart_seconds=1), job("a2", 4, restart_seconds=1))
    starts(scheduler, 0, job("a3", 8, restart_seconds=500), job("b2", 4))
    scheduler.check_invariants()
    hosts = {name: {cluster.host_of(gpu) for gpu in placed.gpus} for name, placed in scheduler.running.items()}
    assert hosts["a1"] == hosts["b1"] != hosts["a2"] and scheduler.free.free == 0
    assert starts(scheduler, 10, job("b3", 8, gpus_per_host=8)) == ["b3"] and victims(scheduler) == [("a3", 0)]


def test_two_tenants_do_not_preempt_each_other_for_ever():
    """volcano#3729, #3869: a gang of 5 beyond each tenant's 8 makes the other's a victim, and so on."""
    scheduler = TenantScheduler(TWO_HOSTS, HALVES)
    names = [f"{tenant}{number}" for number in range(3) for tenant in "ab"]
    counted = 0
    for each in names:
        scheduler.submit(job(each, 5), 0)
    for now in range(100):
        scheduler.start(now)
        scheduler.check_invariants()
        counted += len(scheduler.preemptions)
    assert counted <= 1 and len(scheduler.running) == 3


def test_whoever_gave_way_does_not_disturb_who_took_its_place():
    scheduler = TenantScheduler(TWO_HOSTS, HALVES, AgedPriority())
    saves = {"checkpoint_every": 1, "priority": 5}
    starts(scheduler, 0, job("a1", 8, priority=5), job("a2", 8, **saves | {"priority": 7}))
    assert starts(scheduler, 10, job("b1", 6, **saves)) == ["b1"] and victims(scheduler) == [("a2", 0)]
    assert starts(scheduler, 11, job("b2", 2, **saves), job("b3", 8, priority=5, restart_seconds=50)) == ["b2"]
    scheduler.finish("a1", 20)
    # b3 is more urgent and borrows; a2 reclaims. That b1 and b2 gave way would cost nothing, but b1 is spared.
    assert starts(scheduler, 20) == ["a2"] and victims(scheduler) == [("b3", 0)]
    assert scheduler.preemptions[0].lost == 8 * 50


@pytest.mark.parametrize("nominal", (8, 16))
def test_an_interrupted_gang_does_not_starve_behind_newcomers_that_hold_less(nominal):
    """volcano#5805: dominant resource fairness prefers whoever holds nothing; a repaired gang goes first here."""
    quotas = {"a": TenantQuota(nominal, "x"), "pool": TenantQuota(16 - nominal, "x")}
    quotas |= {f"n{number}": TenantQuota(0, "x") for number in range(50)}
    scheduler = TenantScheduler(TWO_HOSTS, quotas)
    wide = {"gpus_per_host": 8, "seconds": 10_000}
    starts(scheduler, 0, job("a1", 8, **wide), job("a2", 8, **wide), job("a0", 8, **wide))
    lost = scheduler.running["a2"].gpus
    assert scheduler.fail(lost, 1) == ["a2"]
    assert starts(scheduler, 1, *(job(f"new{n}", 4, tenant=f"n{n}", seconds=20_000) for n in range(50))) == []
    assert [task.key for task in scheduler.policy][:2] == ["new0", "new1"]  # the rule alone
    scheduler.restore(lost)
    assert starts(scheduler, 2) == ["a2"] and not scheduler.preemptions
    scheduler.finish("a2", 3)
    assert starts(scheduler, 3)[:1] == (["a0"] if nominal == 16 else ["new0"])  # a0 was not interrupted


def test_a_large_gang_within_its_quota_is_not_passed_by_small_ones_of_its_tenant():
    scheduler = TenantScheduler(TWO_HOSTS, {"a": TenantQuota(8), "b": TenantQuota(8)})
    starts(scheduler, 0, *(job(f"a{number}", 2, seconds=10 + number) for number in range(4)))
    starts(scheduler, 1, job("a_large", 8))
    for now in range(2, 30):
        for name in [name for name, end in ((n, e) for e, n in scheduler._ends()) if end <= now]:
            scheduler.finish(name, now)
        starts(scheduler, now, job(f"a_later{now}", 2, seconds=10))
    assert list(scheduler.running) == ["a_large"]
    assert scheduler.why_waits("a_later2").sentence.startswith("a_later2 needs 2 GPUs, 2 more than 'a'")


def test_small_gangs_do_not_use_up_the_quota_of_the_gang_for_which_gpus_are_kept():
    """The head waits for a whole host, not for quota; of its tenant, only who ends before its start goes ahead."""
    scheduler = TenantScheduler(TWO_HOSTS, {"a": TenantQuota(10), "b": TenantQuota(6)}, FirstComeFirstServed())
    starts(scheduler, 0, job("b1", 2, seconds=100), job("a1", 1, gpus_per_host=1, seconds=100))
    starts(scheduler, 0, job("b2", 4, seconds=1_000))
    spread = {name: {gpu // 8 for gpu in placed.gpus} for name, placed in scheduler.running.items()}
    assert spread == {"b1": {0}, "a1": {0}, "b2": {0}} and scheduler.free.free == 9
    starts(scheduler, 1, job("a2", 1, seconds=100), job("a3", 1, seconds=100))
    assert {gpu // 8 for gpu in scheduler.running["a3"].gpus} == {1}
    assert starts(scheduler, 2, job("a_head", 7, gpus_per_host=7, seconds=9)) == ["a_head"]
    scheduler.finish("a_head", 3)
    assert starts(scheduler, 3, job("a_next", 8, gpus_per_host=8), job("a_long", 1, seconds=500)) == []
    assert scheduler.why_waits("a_next").what == "quota" and scheduler.why_waits("a_long").what == "turn"
    scheduler.finish("a2", 4)
    assert starts(scheduler, 4, job("a_short", 1, seconds=5)) == ["a_short"]
    assert scheduler.reservation.name == "a_next" and scheduler.reservation.time == 101
    assert scheduler.why_waits("a_next").what == "quota"  # for as long as a_short runs, and no longer
    assert scheduler.why_waits("a_long").what == "quota"  # with it, a_next would have none when its host is free
    scheduler.finish("a_short", 9)
    assert starts(scheduler, 9) == [] and scheduler.why_waits("a_next").what == "gpus"
    scheduler.finish("a3", 101)
    assert starts(scheduler, 101) == ["a_next", "a_long"]


def test_an_owner_passes_a_borrower_for_which_gpus_are_kept():
    scheduler = TenantScheduler(TWO_HOSTS, {"a": TenantQuota(4, "x"), "b": TenantQuota(12, "x"),
                                           "c": TenantQuota(0, "x")})  # fmt: skip
    scheduler.drain([0])
    starts(scheduler, 0, job("b1", 8, gpus_per_host=8))
    assert starts(scheduler, 1, job("a_head", 8, gpus_per_host=8)) == [] and scheduler.reservation.name == "a_head"
    assert starts(scheduler, 2, job("c_long", 1, seconds=9_999)) == []  # would use what a_head borrows
    assert starts(scheduler, 3, job("b2", 3, seconds=9_999)) == ["b2", "c_long"]
    assert scheduler.why_waits("a_head").what == "quota" and scheduler.reservation is None
