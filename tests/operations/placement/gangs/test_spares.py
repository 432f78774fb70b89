"""Gangs that lose hosts: with spares in their place, with fewer ranks, or waiting; and how many spares suffice."""

import math
import random

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.price import MeshTraffic
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.gangs.spares import (
    InvalidSpares,
    SparePool,
    chance_spares_suffice,
    share_down,
    spare_hosts,
    with_fewer_ranks,
)
from minilib.ranks.mesh_shape import MeshShape

HOSTS = GpuCluster.regular(2, 4, 4)
TRAYS = GpuCluster.regular(2, 18, 4, nvlink_domain=72, gpu="gb200")


def running(job: GangJob, hosts: list[int], cluster: GpuCluster = HOSTS) -> tuple[GangScheduler, SparePool]:
    scheduler = GangScheduler(cluster)
    pool = SparePool(scheduler, hosts)
    scheduler.submit(job)
    assert [placement.job for placement in scheduler.start(0.0)] == [job]
    return scheduler, pool


def test_spare_hosts_are_nobodys_and_the_last_of_each_group():
    """2 of 18 trays: 128 of 144 GPUs are in use, a ninth is the price."""
    scheduler = GangScheduler(TRAYS)
    pool = SparePool(scheduler, spare_hosts(TRAYS, 2))
    assert spare_hosts(TRAYS, 2) == [16, 17, 34, 35] and spare_hosts(TRAYS, 0) == []
    assert pool.size == 16 and pool.price == 1 / 9 and scheduler.free.free == 128
    scheduler.submit(GangJob("most", 128, segment=64))
    scheduler.submit(GangJob("one", 1))
    assert [placement.job.name for placement in scheduler.start(0.0)] == ["most"]
    assert not set(scheduler.running["most"].gpus) & set(pool.spare)


def test_a_gang_goes_on_with_the_spare_and_each_other_rank_stays():
    job = GangJob("x", 16, mesh=MeshShape.of(dp=4, tp=4))
    scheduler, pool = running(job, [7])
    before = scheduler.running["x"].gpus
    (recovery,) = pool.fail(HOSTS.gpus_of(1), 5.0)
    after = scheduler.running["x"].gpus
    assert recovery.placement.gpus == after and recovery.reason == "" and not scheduler.waiting
    assert after == (*before[:4], *HOSTS.gpus_of(7), *before[8:]) and pool.spare == [] and pool.short == 0
    assert pool.repair(HOSTS.gpus_of(1)) == [] and pool.spare == list(HOSTS.gpus_of(1))  # the next spare
    pool.fail(HOSTS.gpus_of(7), 9.0)
    assert scheduler.running["x"].gpus == before
    pool.check_invariants()
    scheduler.check_invariants()


def test_a_host_lost_between_decision_and_start_is_replaced_and_the_gang_keeps_its_turn():
    scheduler, pool = GangScheduler(HOSTS), None
    pool = SparePool(scheduler, [7])
    scheduler.submit(GangJob("x", 16))
    (decided,) = scheduler.start(0.0)
    scheduler.submit(GangJob("late", 16))
    pool.fail([decided.gpus[0]], 0.0)
    assert list(scheduler.running) == ["x"] and [job.name for job in scheduler.waiting] == ["late"]
    assert decided.gpus[0] not in scheduler.running["x"].gpus
    scheduler.check_invariants()


def test_a_new_host_that_gets_the_last_ranks_tears_groups_apart():
    """tp = 16 on four trays: if all later ranks move up by a tray, a group of tp spans two NVLink domains."""
    work = MeshTraffic(MeshShape.of(dp=8, tp=16), {"tp": 1 << 28, "dp": 1 << 28})
    scheduler, pool = running(GangJob("x", 128, work=work), spare_hosts(TRAYS, 2), TRAYS)
    before = scheduler.running["x"].gpus
    pool.fail(TRAYS.gpus_of(3), 1.0)
    after = scheduler.running["x"].gpus
    assert [rank for rank in range(128) if before[rank] != after[rank]] == [12, 13, 14, 15]
    last = [gpu for gpu in before if gpu in after] + list(TRAYS.gpus_of(16))
    torn = [
        sum(len({gpus[rank] // 72 for rank in group}) > 1 for group in work.mesh.groups("tp")) for gpus in (after, last)
    ]
    assert torn == [0, 2] and sorted(last) == sorted(after)
    assert work.step_seconds(after, TRAYS) == work.step_seconds(before, TRAYS)
    assert work.axis_seconds("tp", last, TRAYS) / work.axis_seconds("tp", after, TRAYS) > 15


def test_two_failures_at_once_need_two_spares():
    job = GangJob("x", 16, mesh=MeshShape.of(dp=4, tp=4))
    for spares, goes_on in (([6, 7], True), ([7], False)):
        scheduler, pool = running(job, spares)
        (recovery,) = pool.fail([*HOSTS.gpus_of(0), *HOSTS.gpus_of(2)], 5.0)
        assert (recovery.placement is not None) == goes_on == ("x" in scheduler.running)
        scheduler.check_invariants()
        pool.check_invariants()
        if goes_on:
            assert scheduler.running["x"].gpus == (*range(24, 28), *range(4, 8), *range(28, 32), *range(12, 16))


def test_more_failures_than_spares_the_gang_waits_with_the_reason_for_what_is_missing_only():
    """28 of 28 GPUs in use, one spare host, two lost: the spare is in use, and one repair is enough."""
    scheduler, pool = running(GangJob("x", 28, mesh=MeshShape.of(dp=7, tp=4)), [7])
    (recovery,) = pool.fail(range(8), 5.0)
    assert recovery.placement is None and "no domain has more than 0 spare GPUs: 4 too few" in recovery.reason
    assert scheduler.start(5.0) == [] and pool.spare == [] and pool.short == 4
    assert pool.repair(range(4)) == [0, 1, 2, 3] and pool.short == 0
    assert [placement.job.name for placement in scheduler.start(6.0)] == ["x"]
    assert pool.repair(range(4, 8)) == [] and pool.spare == [4, 5, 6, 7]
    pool.check_invariants()


def test_the_most_urgent_gang_gets_the_only_spare():
    scheduler = GangScheduler(HOSTS)
    pool = SparePool(scheduler, [7])
    for name, priority in (("later", 1), ("urgent", 0)):
        scheduler.submit(GangJob(name, 4, mesh=MeshShape.of(tp=4), priority=priority))
    gpus = {placement.job.name: placement.gpus for placement in scheduler.start(0.0)}
    urgent, later = pool.fail([gpus["later"][0], gpus["urgent"][0]], 1.0)
    assert urgent.job.name == "urgent" and urgent.placement.gpus == tuple(HOSTS.gpus_of(7))
    assert later.placement is None and list(scheduler.running) == ["urgent"]
    assert set(pool.spare) < set(gpus["urgent"][1:]) and pool.short == 0, "one left in good order is in use"
    pool.check_invariants()


def test_a_gang_with_fewer_ranks_goes_on():
    mesh = MeshShape.of(dp=4, tp=4)
    work = MeshTraffic(mesh, {"tp": 1 << 20})
    scheduler, pool = running(GangJob("x", 16, work=work, min_gpus=8), [7])
    (recovery,) = pool.fail([*HOSTS.gpus_of(0), *HOSTS.gpus_of(1)], 5.0)
    scheduler.check_invariants()
    pool.check_invariants()
    assert recovery.placement.job.mesh == MeshShape.of(dp=3, tp=4) and recovery.job.gpus == 16 and recovery.reason
    assert not set(recovery.placement.gpus) & set(range(8)) and recovery.placement.job.work.mesh.world_size == 12
    scheduler, pool = running(GangJob("x", 16, mesh=mesh, min_gpus=16), [7])
    assert pool.fail(range(8), 5.0)[0].placement is None


def test_fewer_ranks():
    mesh = MeshShape.of(pp=2, dp=3, tp=2)
    job = GangJob("x", 12, mesh=mesh, min_gpus=4)
    assert with_fewer_ranks(job, 11).mesh == MeshShape.of(pp=2, dp=2, tp=2)
    assert with_fewer_ranks(job, 4).gpus == 4 and with_fewer_ranks(job, 3) is None and with_fewer_ranks(job, 0) is None
    assert with_fewer_ranks(GangJob("x", 12, gpus_per_host=4, min_gpus=1), 11).gpus == 8
    assert with_fewer_ranks(GangJob("x", 12, mesh=MeshShape.of(tp=12), min_gpus=1), 11) is None
    assert with_fewer_ranks(GangJob("x", 12), 11) is None


def test_a_spare_that_fails_and_gpus_of_a_drained_host():
    scheduler, pool = running(GangJob("x", 16, mesh=MeshShape.of(dp=4, tp=4)), [6, 7])
    assert pool.fail(HOSTS.gpus_of(6), 1.0) == [] and pool.spare == list(HOSTS.gpus_of(7)) and pool.short == 0
    scheduler.drain(HOSTS.gpus_of(3))
    (recovery,) = pool.fail([0], 2.0)  # moves from host 0; host 3 is drained, and no second host is spare
    assert recovery.placement is None and pool.short == 0
    pool.check_invariants()
    scheduler.check_invariants()


def test_a_spare_stands_in_for_a_drained_host_as_well():
    """A gang that moves anyway leaves its drained host, which then is under repair like the lost one."""
    scheduler, pool = running(GangJob("x", 16, mesh=MeshShape.of(dp=4, tp=4)), [6, 7])
    scheduler.drain(HOSTS.gpus_of(3))
    (recovery,) = pool.fail(HOSTS.gpus_of(0), 2.0)
    assert set(HOSTS.numbers_of("host", recovery.placement.gpus)) == {1, 2, 6, 7}
    assert pool.under_repair == [*HOSTS.gpus_of(0), *HOSTS.gpus_of(3)] and pool.short == 0
    pool.check_invariants()
    assert pool.repair(HOSTS.gpus_of(3)) == [] and pool.spare == list(HOSTS.gpus_of(3))


@pytest.mark.parametrize("hosts", [[8], [-1], [1, 1], range(8), [0.5]])
def test_hosts_that_are_no_spares(hosts):
    with pytest.raises(InvalidSpares, match="some of the 8 hosts"):
        SparePool(GangScheduler(HOSTS), hosts)


def test_what_is_in_use_is_no_spare_and_what_is_well_is_not_repaired():
    scheduler, pool = running(GangJob("x", 28), [7])
    with pytest.raises(InvalidSpares, match="GPU 0 is in use"):
        SparePool(scheduler, [0])
    with pytest.raises(InvalidSpares, match="GPU 3 is not under repair; 0 are"):
        pool.repair([3])
    with pytest.raises(IndexError):
        pool.fail([1, 99], 0.0)
    assert len(scheduler.running["x"].gpus) == 28
    with pytest.raises(InvalidSpares, match="a domain of .* has 1 hosts: 1 spare ones would leave none"):
        spare_hosts(HOSTS, 1)


def test_gangs_and_spares_over_many_failures():
    """No GPU is lost from the count, and whoever waits does not wait beside idle spares that it could use."""
    choices, cluster = random.Random(5), GpuCluster.regular(4, 4, 4, nvlink_domain=16)
    scheduler = GangScheduler(cluster)
    pool, recovered = SparePool(scheduler, spare_hosts(cluster, 1)), {"whole": 0, "fewer": 0, "waits": 0}
    for step in range(3_000):
        operation = choices.choice(("submit", "finish", "fail", "fail", "repair", "repair"))
        if operation == "submit" and len(scheduler.waiting) < 5:
            dp, least = choices.randint(1, 6), choices.random() < 0.5
            job = GangJob(f"j{step}", 4 * dp, mesh=MeshShape.of(dp=dp, tp=4), min_gpus=4 if least else None)
            assert scheduler.submit(job, step) is None
        elif operation == "finish" and scheduler.running:
            scheduler.finish(choices.choice(list(scheduler.running)), step)
        elif operation == "fail" and len(pool.under_repair) < 24:
            hosts = choices.sample(range(16), choices.choice((1, 1, 2)))
            for recovery in pool.fail([gpu for host in hosts for gpu in cluster.gpus_of(host)], step):
                whole = recovery.placement is not None and recovery.placement.job == recovery.job
                assert whole == (recovery.reason == "")
                recovered["whole" if whole else "fewer" if recovery.placement else "waits"] += 1
        elif operation == "repair" and pool.under_repair:
            pool.repair(choices.sample(pool.under_repair, 1 + choices.randrange(len(pool.under_repair))))
        scheduler.start(step)
        scheduler.check_invariants()
        pool.check_invariants()
    assert min(recovered.values()) > 20, recovered


def test_how_many_spares_suffice():
    """Against the sum with whole-number binomials, and against a seeded count of hosts that fail and are repaired."""
    for hosts, spares, down in ((18, 2, 0.05), (18, 0, 0.3), (5, 5, 0.9), (40, 3, 0.02)):
        exact = sum(math.comb(hosts, k) * down**k * (1 - down) ** (hosts - k) for k in range(spares + 1))
        assert chance_spares_suffice(hosts, spares, down) == pytest.approx(exact, rel=1e-12)
    assert chance_spares_suffice(80_000, 8_200, 0.1) > 0.99 > 0.01 > chance_spares_suffice(80_000, 7_800, 0.1)
    assert [chance_spares_suffice(3, 2, p) for p in (0, 1)] == [1, 0] and chance_spares_suffice(3, 3, 1) == 1
    choices, suffice, down = random.Random(0), 0, share_down(950, 50)
    up = [True] * 18
    until = [choices.expovariate(1 / 950) for _ in up]
    for look in range(20_000):
        now = 200.0 * look
        for host in range(18):
            while until[host] < now:
                up[host] = not up[host]
                until[host] += choices.expovariate(1 / 950) if up[host] else 50.0
        suffice += up.count(False) <= 2
    expected = chance_spares_suffice(18, 2, down)
    assert down == 0.05 and abs(suffice / 20_000 - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_numbers_of_spares_that_are_none():
    for arguments in ((3, 4, 0.1), (3, -1, 0.1), (3, 1, 1.1), (3, 1, math.nan), (2.5, 1, 0.1)):
        with pytest.raises(ValueError):
            chance_spares_suffice(*arguments)
    for arguments in ((0, 1), (math.inf, 1), (1, -1), (1, math.nan)):
        with pytest.raises(ValueError):
            share_down(*arguments)


def test_a_reason_that_is_none_changes_nothing():
    scheduler, pool = running(GangJob("x", 16), [7])
    with pytest.raises(ValueError, match="got 'broken'"):
        pool.fail([0], 1.0, "broken")
    pool.check_invariants()
    assert pool.under_repair == [] and scheduler.running["x"].gpus == tuple(range(16))


@pytest.mark.parametrize("host", [1.0, True])
def test_a_host_that_is_no_whole_number_is_no_spare(host):
    with pytest.raises(InvalidSpares):
        SparePool(GangScheduler(HOSTS), [host])
