"""Replicas stand apart and gangs together: what each is for, in counts."""

import random
from collections import Counter

import pytest

from minilib.mechanisms.scheduling.placing import InvalidClaim, Refusal
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import best_placement
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.price import MeshTraffic
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.replicas.controller import ReplicaController
from minilib.operations.placement.replicas.replica_set import DisruptionBudget, InvalidReplicaSet, ReplicaSet
from minilib.operations.placement.replicas.routers import place_routers
from minilib.operations.placement.replicas.spread import SpreadPlacement
from minilib.ranks.mesh_shape import MeshShape

RACKS = GpuCluster.regular(4, 2, 8)
NVL = GpuCluster.regular(4, 4, 4, nvlink_domain=16, gpu="gb200")


def placed(service: ReplicaSet, cluster: GpuCluster, scheduler: GangScheduler | None = None) -> list[tuple[int, ...]]:
    """GPUs of each replica that was placed."""
    scheduler = scheduler or GangScheduler(cluster, place=SpreadPlacement())
    jobs = [service.job(number) for number in range(service.replicas)]
    scheduler.place.names[service.name] = {job.name for job in jobs}
    for job in jobs:
        assert scheduler.submit(job) is None
    scheduler.start(0.0)
    scheduler.check_invariants()
    return [scheduler.running[job.name].gpus for job in jobs if job.name in scheduler.running]


@pytest.mark.parametrize("replicas", [1, 3, 4, 5, 8, 15, 16])
@pytest.mark.parametrize("level", ["rack", "domain", "host"])
def test_a_group_has_no_more_than_its_share(replicas, level):
    gpus = placed(ReplicaSet("chat", replicas, gpus=4, spread_over=level), RACKS)
    groups = Counter(RACKS.numbers_of(level, [each[0] for each in gpus]))
    assert len(gpus) == replicas and max(groups.values()) == -(-replicas // len(RACKS.groups(level)))


def test_packed_replicas_are_lost_together():
    """4 replicas of 4 GPUs: packed all stand in one rack, spread each has its own."""
    scheduler = GangScheduler(RACKS)
    for number in range(4):
        scheduler.submit(GangJob(f"packed-{number}", 4, mesh=MeshShape.of(tp=4)))
    packed = [placement.gpus for placement in scheduler.start(0.0)]
    spread = placed(ReplicaSet("chat", 4, gpus=4), RACKS)
    lost = [max(Counter(RACKS.numbers_of("rack", [each[0] for each in gpus])).values()) for gpus in (packed, spread)]
    assert lost == [4, 1]


def test_what_keeps_a_service_alive_slows_a_mesh():
    """One cluster, 16 GPUs: as replicas spread over racks, and as one mesh that is packed, or spread as they are."""
    replicas = placed(ReplicaSet("chat", 4, gpus=4), NVL)
    mesh = MeshShape.of(dp=4, tp=4)
    work = MeshTraffic(mesh, {"tp": 1 << 26, "dp": 1 << 30})
    job = GangJob("mesh", 16, work=work)
    packed = best_placement(job, FreeGpus(NVL)).gpus
    spread = [gpu for each in replicas for gpu in each]
    racks = [len(set(NVL.numbers_of("rack", gpus))) for gpus in (packed, spread)]
    seconds = [work.step_seconds(gpus, NVL) for gpus in (packed, spread)]
    dp = [work.axis_seconds("dp", gpus, NVL) for gpus in (packed, spread)]
    assert racks == [1, 4] and seconds[1] / seconds[0] > 14
    assert dp[1] / dp[0] == pytest.approx(18, rel=0.01), "900 GB/s within the domain, 50 GB/s beyond it"
    assert work.axis_seconds("tp", packed, NVL) == work.axis_seconds("tp", spread, NVL), "tp is within a domain in both"


def test_a_replica_stays_in_a_domain_and_on_one_host_if_it_can():
    for gpus in placed(ReplicaSet("chat", 8, gpus=8), NVL):
        assert len(set(NVL.numbers_of("domain", gpus))) == 1 and len(set(NVL.numbers_of("host", gpus))) == 2
    for gpus in placed(ReplicaSet("chat", 16, gpus=3), NVL):
        assert len(set(NVL.numbers_of("host", gpus))) == 1
    refused = GangScheduler(NVL, place=SpreadPlacement()).submit(ReplicaSet("chat", 1, gpus=32).job(0))
    assert "32 GPUs in one NVLink domain" in refused.reason and "the largest has 16: 16 too many" in refused.reason


def test_no_more_together_than_asked_for():
    service = ReplicaSet("chat", 9, gpus=4, most_together=2)
    scheduler = GangScheduler(RACKS, place=SpreadPlacement())
    assert len(placed(service, RACKS, scheduler)) == 8 and [job.name for job in scheduler.waiting] == ["chat-8"]
    scheduler.submit(GangJob("mesh", 32))
    assert [placement.job.name for placement in scheduler.start(1.0)] == ["mesh"], "nobody waits behind it"
    scheduler.finish("chat-0", 2.0)
    assert [placement.job.name for placement in scheduler.start(2.0)] == ["chat-8"]


def test_a_replica_takes_the_domain_with_least_to_give_and_the_labels_it_asks_for():
    scheduler = GangScheduler(RACKS, place=SpreadPlacement())
    scheduler.submit(GangJob("mesh", 12))
    scheduler.start(0.0)
    (gpus,) = placed(ReplicaSet("chat", 1, gpus=4), RACKS, scheduler)
    assert gpus == tuple(range(12, 16))
    (refused,) = [scheduler.submit(ReplicaSet("other", 1, selector={"zone": "a"}).job(0))]
    assert "zone=a" in refused.reason


def test_spread_over_any_state():
    """Whatever else runs: a replica gets a rack that has room, with no more siblings than any other such rack."""
    choices = random.Random(3)
    for _ in range(300):
        free, place = FreeGpus(RACKS), SpreadPlacement()
        others = choices.sample(range(64), choices.randrange(50))
        if others:
            free.take("others", others)
        service = ReplicaSet("chat", 12, gpus=choices.choice((1, 2, 4, 8)))
        for number in range(12):
            job = service.job(number)
            room = {rack.number for rack in RACKS.groups("rack")
                    if any(len(free.free_on(host)) >= job.gpus for host in rack.hosts)}  # fmt: skip
            siblings = place.siblings(job, free)["rack"]
            placement = place(job, free)
            assert (placement is None) == (not room)
            if placement is not None:
                (rack,) = set(RACKS.numbers_of("rack", placement.gpus))
                assert siblings[rack] == min(siblings[each] for each in room)
                free.take(job.name, placement.gpus)
                place.names.setdefault("chat", set()).add(job.name)


@pytest.mark.parametrize("wrong", [
    {"replicas": -1}, {"replicas": 1.5}, {"gpus": 0}, {"gpus": 1.5}, {"spread_over": "room"}, {"most_together": 0},
    {"start_seconds": float("nan")}, {"start_seconds": -1}, {"name": ""},
])  # fmt: skip
def test_services_that_are_none(wrong):
    with pytest.raises(InvalidReplicaSet):
        ReplicaSet(**{"name": "chat", "replicas": 1} | wrong)


def test_budgets():
    assert [DisruptionBudget(min_available=3).allowed(4, ready) for ready in range(6)] == [0, 0, 0, 0, 1, 2]
    assert [DisruptionBudget(max_unavailable=1).allowed(4, ready) for ready in range(6)] == [0, 0, 0, 0, 1, 2]
    assert (
        DisruptionBudget(max_unavailable=9).allowed(4, 4) == 4
        and DisruptionBudget(max_unavailable=0).allowed(4, 4) == 0
    )
    for wrong in ({}, {"min_available": 1, "max_unavailable": 1}, {"min_available": -1}, {"max_unavailable": 0.5}):
        with pytest.raises(InvalidReplicaSet):
            DisruptionBudget(**wrong)


def test_routers_have_hosts_and_no_gpus():
    free = FreeGpus(RACKS)
    hosts = place_routers([f"router-{n}" for n in range(4)], free)
    assert {RACKS.hosts[RACKS.host_named(host)].rack for host in hosts.values()} == {"rack0", "rack1", "rack2", "rack3"}
    assert free.free == 64
    free.take_out(RACKS.gpus_of(0), "failed")
    assert place_routers(["one"], free) == {"one": "host1"} and place_routers([], free) == {}
    refusal = place_routers([f"router-{n}" for n in range(8)], free)
    assert isinstance(refusal, Refusal) and refusal.placed == 7
    with pytest.raises(InvalidClaim):
        place_routers(["same", "same"], free)


def test_replicas_of_several_hosts_share_a_domain_but_no_host():
    cluster = GpuCluster.regular(1, 4, 1, nvlink_domain=4)
    controller = ReplicaController(GangScheduler(cluster, place=SpreadPlacement()))
    controller.add(ReplicaSet("chat", 2, gpus=2, spread_over="host", most_together=1), 0.0)
    assert len(controller.step(0.0)) == 2
