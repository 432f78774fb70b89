"""Services while hosts are drained, fail and are taken by others: never fewer serve by choice than a budget says."""

import random

import pytest

from minilib.mechanisms.scheduling import AgedPriority
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, UnknownJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.gangs.spares import SparePool
from minilib.operations.placement.replicas.controller import DisruptionRefused, ReplicaController
from minilib.operations.placement.replicas.replica_set import DisruptionBudget, InvalidReplicaSet, ReplicaSet
from minilib.operations.placement.replicas.spread import SpreadPlacement
from minilib.ranks.mesh_shape import MeshShape

RACKS = GpuCluster.regular(4, 2, 8)


def serving(*services: ReplicaSet, cluster: GpuCluster = RACKS, policy=None) -> ReplicaController:
    controller = ReplicaController(GangScheduler(cluster, policy, place=SpreadPlacement()))
    for service in services:
        assert controller.add(service, -1e6) is None
    controller.step(-1e6)
    return controller


def test_replicas_serve_once_their_weights_are_loaded():
    controller = ReplicaController(GangScheduler(RACKS, place=SpreadPlacement()))
    controller.add(ReplicaSet("chat", 3, gpus=4, start_seconds=60), 0.0)
    assert controller.ready("chat", 0.0) == [] and len(controller.step(5.0)) == 3
    assert [len(controller.ready("chat", now)) for now in (64.0, 65.0)] == [0, 3]
    controller.check_invariants()


def test_a_drain_waits_for_replacements():
    """Both replicas of a host go, the second once the first serves elsewhere; the host is empty afterwards."""
    service = ReplicaSet("chat", 16, gpus=4, start_seconds=60, budget=DisruptionBudget(max_unavailable=1))
    controller = serving(service, cluster=GpuCluster.regular(5, 2, 8))
    host = next(host for host in range(10) if len(controller.on_host(host)) == 2)
    controller.drain(host)
    assert len(controller.on_host(host)) == 2, "nobody goes before the next step"
    history = []
    for now in range(0, 200, 10):
        controller.step(float(now))
        history.append((len(controller.on_host(host)), len(controller.ready("chat", float(now)))))
        assert len(controller.ready("chat", float(now))) >= 15
    assert history[:8] == [(1, 15)] * 6 + [(0, 15)] * 2 and history[-1] == (0, 16)
    assert controller.blocked(200.0) == {}
    controller.undrain(host)
    assert controller.scheduler.free.is_free(controller.scheduler.cluster.gpus_of(host)[0])


def test_a_drain_that_a_budget_blocks_for_ever_says_so():
    controller = serving(ReplicaSet("one", 1, budget=DisruptionBudget(min_available=1)))
    (host,) = [host for host in range(8) if controller.on_host(host)]
    controller.drain(host)
    for now in range(0, 100_000, 1_000):
        controller.step(float(now))
    assert controller.on_host(host) == ["one-0"] == controller.ready("one", 1e5)
    assert controller.blocked(1e5) == {
        "host0": "one-0 stays: of 1 replicas of one 1 serve, and 1 have to: it never may go; want more replicas than "
        "that, or allow one to be unavailable"
    }
    controller.scale("one", 2, 1e5)
    controller.step(1e5)
    controller.step(1e5)
    assert controller.on_host(host) == [] and controller.blocked(1e5) == {}


def test_a_drain_that_waits_says_for_what():
    controller = serving(ReplicaSet("chat", 8, gpus=8))
    controller.drain(0)
    controller.step(0.0)
    assert controller.on_host(0) == [] and len(controller.ready("chat", 0.0)) == 7, "one waits: no host is free"
    controller.drain(1)
    controller.step(1.0)
    assert "7 serve, and 7 have to: it waits for others to be ready" in controller.blocked(1.0)["host1"]
    controller.undrain(0)
    controller.step(2.0)
    controller.step(2.0)
    assert controller.on_host(1) == [] and len(controller.ready("chat", 2.0)) == 7


def test_a_drain_leaves_what_failed_or_is_reserved():
    controller = serving()
    free = controller.scheduler.free
    controller.scheduler.fail([0], 0.0)
    controller.scheduler.drain([1], "reserved")
    controller.drain(0)
    controller.scheduler.fail([2], 0.0)
    assert [free.out(gpu) for gpu in range(9)] == ["failed", "reserved", "failed", *["drained"] * 5, None]
    controller.undrain(0)
    assert [free.out(gpu) for gpu in range(9)] == ["failed", "reserved", "failed", *[None] * 6]
    with pytest.raises(ValueError, match="host 0 is not drained; none are"):
        controller.undrain(0)
    for host in (8, -1, 0.5):
        with pytest.raises(IndexError, match="none of the 8"):
            controller.drain(host)


def test_a_replica_ends_its_requests_before_it_goes():
    requests = {}
    controller = serving(ReplicaSet("chat", 2, gpus=8))
    controller.in_flight = lambda name: requests.get(name, 0)
    requests["chat-1"] = 3
    assert controller.scale("chat", 1, 0.0) is None
    controller.step(0.0)
    assert controller.ready("chat", 0.0) == ["chat-0"] and "chat-1" in controller.scheduler.running
    assert controller.replicas("chat") == ["chat-0", "chat-1"]
    controller.scale("chat", 2, 1.0)
    assert controller.ready("chat", 1.0) == ["chat-0", "chat-1"], "taken back while it still has requests"
    controller.scale("chat", 0, 2.0)
    controller.step(2.0)
    assert controller.replicas("chat") == ["chat-1"] and controller.ready("chat", 2.0) == []
    requests["chat-1"] = 0
    controller.step(3.0)
    assert controller.replicas("chat") == [] and controller.scheduler.free.free == 64
    controller.scale("chat", 1, 4.0)
    assert controller.replicas("chat") == ["chat-2"], "no name comes twice"
    controller.check_invariants()


def test_who_goes_first_when_fewer_are_wanted():
    """Who waits, who starts, who has most siblings beside it."""
    controller = serving(ReplicaSet("chat", 9, gpus=8, start_seconds=60))
    controller.scale("chat", 8, 0.0)
    assert "chat-8" not in controller.replicas("chat") and len(controller.ready("chat", 0.0)) == 8
    controller.scheduler.fail(RACKS.gpus_of(0), 0.0)
    controller.scheduler.restore(RACKS.gpus_of(0))
    controller.step(1.0)
    (starts,) = set(controller.replicas("chat")) - set(controller.ready("chat", 1.0))
    controller.scale("chat", 7, 2.0)
    assert starts not in controller.replicas("chat")
    controller.scale("chat", 4, 3.0)
    racks = [RACKS.numbers_of("rack", [placement.gpus[0]])[0] for placement in controller.scheduler.running.values()]
    assert sorted(racks) == [0, 1, 2, 3]


def test_others_make_room_only_as_budgets_allow():
    policy = AgedPriority(patience=1e9)
    controller = serving(
        ReplicaSet("chat", 8, gpus=8, priority=1, budget=DisruptionBudget(min_available=6)), policy=policy
    )
    urgent, larger = (GangJob(f"train{hosts}", 8 * hosts, mesh=MeshShape.of(dp=hosts, tp=8)) for hosts in (2, 3))
    assert controller.victims(larger, 0.0) is None and controller.make_room(larger, 0.0) is None
    assert len(controller.ready("chat", 0.0)) == 8
    assert controller.victims(GangJob("equal", 8, priority=1), 0.0) is None
    controller.scheduler.submit(urgent, 0.0)
    gone = controller.make_room(urgent, 0.0)
    assert [placement.job.name for placement in controller.step(1.0)] == ["train2"] and len(gone) == 2
    assert len(controller.ready("chat", 1.0)) == 6 and controller.allowed("chat", 1.0) == 0
    with pytest.raises(DisruptionRefused, match="of 8 replicas of chat 6 serve, and 6 have to"):
        controller.evict(controller.ready("chat", 1.0)[0], 1.0)
    with pytest.raises(UnknownJob, match="no replica that is placed"):
        controller.evict(gone[0], 1.0)
    controller.check_invariants()


def test_no_more_victims_than_the_job_needs():
    controller = serving(ReplicaSet("chat", 16, gpus=4, priority=1, budget=DisruptionBudget(min_available=0)))
    victims = controller.victims(GangJob("tp", 8, mesh=MeshShape.of(tp=8)), 0.0)
    assert len(victims) == 2 and len({controller.scheduler.running[name].gpus[0] // 8 for name in victims}) == 1
    assert controller.victims(GangJob("none", 1, priority=0, selector={"zone": "a"}), 0.0) is None


def test_a_failure_asks_no_budget_and_a_drain_then_stops():
    service = ReplicaSet("chat", 4, gpus=8, budget=DisruptionBudget(min_available=4))
    controller = serving(service)
    lost = next(host for host in range(8) if controller.on_host(host))
    controller.scheduler.fail(RACKS.gpus_of(lost), 0.0)
    assert len(controller.ready("chat", 0.0)) == 3 and controller.allowed("chat", 0.0) == 0
    controller.step(1.0)
    assert len(controller.ready("chat", 1.0)) == 4


def test_a_replica_that_a_spare_replaces_starts_anew():
    scheduler = GangScheduler(RACKS, place=SpreadPlacement())
    pool, controller = SparePool(scheduler, [7]), ReplicaController(scheduler)
    controller.add(ReplicaSet("chat", 1, gpus=8, start_seconds=60), -100.0)
    controller.step(-100.0)
    (recovery,) = pool.fail([scheduler.running["chat-0"].gpus[3]], 0.0)
    assert recovery.placement.gpus == tuple(RACKS.gpus_of(7)) and controller.ready("chat", 0.0) == []
    controller.step(0.0)
    assert [len(controller.ready("chat", now)) for now in (59.0, 60.0)] == [0, 1]


def test_services_that_cannot_be_added_or_scaled():
    with pytest.raises(InvalidReplicaSet, match="give GangScheduler place=SpreadPlacement"):
        ReplicaController(GangScheduler(RACKS))
    controller = serving(ReplicaSet("none", 0))
    assert controller.ready("none", 0.0) == [] and controller.allowed("none", 0.0) == 0
    with pytest.raises(InvalidReplicaSet, match="there is a service 'none' already"):
        controller.add(ReplicaSet("none", 1), 0.0)
    for replicas in (-1, 1.5, None):
        with pytest.raises(InvalidReplicaSet):
            controller.scale("none", replicas, 0.0)
    with pytest.raises(UnknownJob, match="no service 'other'; there are none"):
        controller.scale("other", 1, 0.0)
    refused = controller.add(ReplicaSet("large", 2, gpus=16), 0.0)
    assert "one NVLink domain" in refused.reason or "largest host" in refused.reason
    with pytest.raises(UnknownJob):
        controller.ready("large", 0.0)
        controller.allowed("large", 0.0)
    controller.add(ReplicaSet("asleep", 0, gpus=16), 0.0)
    assert controller.scale("asleep", 1, 0.0) is not None and controller.scale("asleep", 1, 0.0) is not None
    controller.check_invariants()


@pytest.mark.parametrize("seed", [0, 1])
def test_services_and_gangs_over_many_operations(seed):
    """5,200 operations in all: nothing but a failure or fewer that are wanted takes a service below its budget."""
    choices, cluster = random.Random(seed), (RACKS, GpuCluster.regular(3, 4, 4, nvlink_domain=16))[seed]
    requests: dict[str, int] = {}
    scheduler = GangScheduler(cluster, AgedPriority(patience=1e9), place=SpreadPlacement())
    controller = ReplicaController(scheduler, lambda name: requests.get(name, 0))
    services, counted, drained = [], {}, set()
    for step in range(2_600):
        now = float(step)
        operation = choices.choices(
            ("add", "scale", "submit", "finish", "fail", "restore", "drain", "undrain", "evict", "room", "load"),
            (2, 8, 10, 12, 2, 6, 3, 4, 12, 6, 10),
        )[0]
        before = {service: len(controller.ready(service, now)) for service in services}
        scaled = choices.choice(services) if services else None
        if operation == "add" and len(services) < 4:
            least = choices.choice((None, 1, 2))
            budget = DisruptionBudget(least, choices.randrange(3) if least is None else None)
            service = ReplicaSet(f"s{step}", choices.randrange(6), choices.choice((1, 2, 4)), budget,
                                 start_seconds=choices.randrange(9), priority=choices.randrange(3))  # fmt: skip
            assert controller.add(service, now) is None
            services.append(service.name)
        elif operation == "scale" and services:
            assert controller.scale(scaled, choices.randrange(6), now) is None
        elif operation == "submit" and len(scheduler.waiting) < 12:
            job = GangJob(f"g{step}", choices.choice((1, 4, 8, 16)), seconds=30, priority=choices.randrange(3))
            assert scheduler.submit(job, now) is None
        elif operation == "finish":
            gangs = [name for name in scheduler.running if name.startswith("g")]
            scheduler.finish(choices.choice(gangs), now) if gangs else None
        elif operation == "fail":
            scheduler.fail(cluster.gpus_of(choices.randrange(len(cluster.hosts))), now)
        elif operation == "restore":
            scheduler.restore([gpu for gpu in range(cluster.gpus) if scheduler.free.out(gpu) == "failed"])
        elif operation == "drain" and len(drained) < 3:
            drained.add(host := choices.randrange(len(cluster.hosts)))
            controller.drain(host)
        elif operation == "undrain" and drained:
            controller.undrain(drained.pop())
        elif operation == "evict" and scaled:
            ready = controller.ready(scaled, now)
            try:
                controller.evict(choices.choice(ready or controller.replicas(scaled) or ["none"]), now)
            except (DisruptionRefused, UnknownJob) as error:
                counted[type(error)] = counted.get(type(error), 0) + 1
        elif operation == "room" and scheduler.waiting:
            controller.make_room(choices.choice(scheduler.waiting), now)
        elif operation == "load":
            requests = {name: choices.randrange(3) for s in services for name in controller.replicas(s)}
        counted[operation] = counted.get(operation, 0) + 1
        for again in range(3):
            for service, ready in before.items():
                its, after = controller.wanted(service), len(controller.ready(service, now))
                asked = operation != "fail" and (operation, service) != ("scale", scaled)
                assert not asked or after >= min(ready, its.budget.least(its.replicas)), (service, operation)
            if again < 2:
                controller.step(now)
        controller.check_invariants()
        scheduler.check_invariants()
    assert min(counted.values()) > 20 and {DisruptionRefused, UnknownJob} <= counted.keys(), counted
    for host in drained:
        controller.undrain(host)
    scheduler.restore(range(cluster.gpus))
    requests = {}
    for name in [name for name in scheduler.running if name.startswith("g")]:
        scheduler.finish(name, 2_600.0)
    while any(job.name.startswith("g") for job in scheduler.waiting):
        controller.step(2_700.0)
        for name in [name for name in scheduler.running if name.startswith("g")]:
            scheduler.finish(name, 2_700.0)
    controller.step(2_800.0)
    for service in services:
        assert len(controller.ready(service, 2_900.0)) == controller.wanted(service).replicas
