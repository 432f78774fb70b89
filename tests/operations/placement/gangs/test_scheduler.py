"""Gangs over time: all or nothing, who goes ahead of whom, and what becomes of a gang that loses a host."""

import random
from dataclasses import replace

import pytest

from minilib.mechanisms.scheduling import AgedPriority, FairShare
from minilib.operations.placement.cluster.capacity import NotFree
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, InvalidJob, Refused
from minilib.operations.placement.gangs.scheduler import GangScheduler, UnknownJob
from minilib.ranks.mesh_shape import MeshShape

HUNDRED = GpuCluster.regular(25, 4, 1)
SMALL = GpuCluster.regular(2, 2, 4)


def started(scheduler: GangScheduler, now: float) -> list[str]:
    names = [placement.job.name for placement in scheduler.start(now)]
    scheduler.check_invariants()
    return names


def test_of_two_gangs_of_100_on_100_nodes_exactly_one_runs():
    """volcano#3373: both half placed would wait for each other for ever."""
    scheduler = GangScheduler(HUNDRED)
    for name in ("a", "b"):
        assert scheduler.submit(GangJob(name, 100)) is None
    assert started(scheduler, 0) == ["a"] and scheduler.free.free == 0
    assert started(scheduler, 10) == []
    scheduler.finish("a", 20)
    assert started(scheduler, 20) == ["b"] and scheduler.waiting == []


def test_small_jobs_go_ahead_only_if_the_large_one_is_not_delayed():
    """60 of 100 run until 100; the head needs 100. Who ends by then goes ahead, who does not waits."""
    scheduler = GangScheduler(HUNDRED)
    scheduler.submit(GangJob("runs", 60, seconds=100))
    assert started(scheduler, 0) == ["runs"]
    for job in (GangJob("head", 100), GangJob("long", 10, seconds=101), GangJob("short", 10, seconds=90)):
        scheduler.submit(job)
    assert started(scheduler, 10) == ["short"]
    assert scheduler.reservation.time == 100 and len(scheduler.reservation.gpus) == 100
    scheduler.finish("short", 50)
    assert started(scheduler, 50) == []  # 51 seconds are left for those who end by then
    scheduler.finish("runs", 100)
    assert started(scheduler, 100) == ["head"] and [job.name for job in scheduler.waiting] == ["long"]


def test_a_long_job_goes_ahead_on_gpus_that_the_head_does_not_need():
    scheduler = GangScheduler(HUNDRED)
    scheduler.submit(GangJob("runs", 60, seconds=100))
    assert started(scheduler, 0) == ["runs"]
    scheduler.submit(GangJob("head", 80))
    scheduler.submit(GangJob("long", 10, seconds=10_000))
    scheduler.submit(GangJob("too much", 11, seconds=10_000))
    assert started(scheduler, 0) == ["long"]
    kept = scheduler.reservation
    assert len(kept.gpus) == 80 and kept.gpus.isdisjoint(scheduler.running["long"].gpus)
    scheduler.finish("runs", 70)
    assert started(scheduler, 70) == ["head"]


def test_without_backfill_nobody_goes_ahead():
    scheduler = GangScheduler(HUNDRED, backfill=False)
    for job in (GangJob("runs", 60), GangJob("head", 100), GangJob("short", 10, seconds=1)):
        scheduler.submit(job)
    assert started(scheduler, 0) == ["runs"]
    with pytest.raises(ValueError, match="depth"):
        GangScheduler(HUNDRED, depth=-1)


@pytest.mark.parametrize("seed", range(8))
def test_the_head_starts_no_later_than_its_room_was_kept_for(seed):
    """Small jobs keep coming; estimates are upper bounds. Each gang's first promise holds, and large ones start."""
    choices = random.Random(seed)
    scheduler, promised, ends, at = GangScheduler(SMALL), {}, {}, {}
    waiting = {}
    for number in range(300):
        gpus = choices.choice((1, 1, 1, 2, 2, 4, 8, 16))
        mesh = MeshShape.of(dp=gpus // min(gpus, 2), tp=min(gpus, 2)) if choices.random() < 0.5 else None
        waiting[f"job{number}"] = (
            number * 1.0,
            GangJob(f"job{number}", gpus, mesh=mesh, seconds=choices.randint(1, 40)),
        )
    now, large = 0.0, 0
    while waiting or ends or scheduler.waiting:
        now = min([when for when, _ in waiting.values()] + list(ends.values()))
        for name in [name for name, end in ends.items() if end <= now]:
            scheduler.finish(name, now)
            del ends[name]
        for name in [name for name, (when, _) in waiting.items() if when <= now]:
            assert scheduler.submit(waiting.pop(name)[1], now) is None
        for placement in scheduler.start(now):
            name, job = placement.job.name, placement.job
            assert now <= promised.get(name, now), f"{name} starts at {now}, promised for {promised[name]}"
            ends[name], at[name] = now + choices.uniform(0.1, 1) * job.seconds, now
            large += job.gpus == 16
        scheduler.check_invariants()
        if scheduler.reservation is not None:
            promised.setdefault(scheduler.reservation.name, scheduler.reservation.time)
    assert len(at) == 300 and large > 10 and len(promised) > 30


def test_a_gang_that_lost_a_node_does_not_starve_behind_fresh_jobs():
    """volcano#5805: it comes back to the place that it had, and room is kept for it once it fits again."""
    scheduler = GangScheduler(HUNDRED)
    scheduler.submit(GangJob("gang", 100))
    assert started(scheduler, 0) == ["gang"]
    assert scheduler.fail([7], 10) == ["gang"] and scheduler.free.free == 99
    for number in range(5):
        scheduler.submit(GangJob(f"fresh{number}", 40, seconds=50), 11)
    assert [job.name for job in scheduler.waiting][0] == "gang"
    assert started(scheduler, 11) == ["fresh0", "fresh1"]  # the gang waits for a repair, and holds up nobody
    scheduler.restore([7])
    assert started(scheduler, 20) == [] and scheduler.reservation.name == "gang"
    scheduler.finish("fresh0", 30)
    assert started(scheduler, 30) == []  # fresh2 would end at 80, after the gang's time
    scheduler.finish("fresh1", 61)
    assert started(scheduler, 61) == ["gang"]


def test_who_gives_way_keeps_its_place():
    """Preempted or failed, it is before those that came later and waited all the time."""
    scheduler = GangScheduler(HUNDRED)
    for name in ("first", "second"):
        scheduler.submit(GangJob(name, 100))
    assert started(scheduler, 0) == ["first"]
    scheduler.preempt("first", 5, seconds=7)
    assert [job.name for job in scheduler.waiting] == ["first", "second"]
    assert started(scheduler, 5) == ["first"]
    scheduler.finish("second", 6)
    scheduler.submit(GangJob("third", 100), 6)
    assert started(scheduler, 6) == [] and scheduler.reservation.time == 12  # by the estimate of what was left of it


def test_a_node_that_is_lost_between_decision_and_start_leaves_nothing_behind():
    """kueue#9616: the gang is decided anew at once, elsewhere, and no part of it is left on the old GPUs."""
    scheduler = GangScheduler(SMALL)
    scheduler.submit(GangJob("x", 4, mesh=MeshShape.of(tp=4)))
    assert started(scheduler, 0) == ["x"]
    before = scheduler.running["x"].gpus
    assert scheduler.fail([before[2]], 0, why="drained") == ["x"]
    assert started(scheduler, 0) == ["x"] and scheduler.free.free == 16 - 4 - 1
    assert not set(scheduler.running["x"].gpus) & set(before)


def test_a_node_that_rejects_is_not_asked_again():
    """kubernetes#84869: each host is asked once, so that a gang is started anew four times at most, not for ever."""
    scheduler, attempts = GangScheduler(SMALL), []
    scheduler.submit(GangJob("x", 4, mesh=MeshShape.of(tp=4)))
    while placements := scheduler.start(0):
        host = SMALL.host_of(placements[0].gpus[0])
        attempts.append(host)
        scheduler.reject("x", host, 0)
        scheduler.check_invariants()
    assert sorted(attempts) == [0, 1, 2, 3]
    scheduler.restore(range(16))
    assert started(scheduler, 1) == ["x"]
    with pytest.raises(UnknownJob, match="no GPU on host"):
        scheduler.reject("x", (SMALL.host_of(scheduler.running["x"].gpus[0]) + 1) % 4, 1)


def test_the_same_policies_choose_who_goes_next():
    urgent = GangScheduler(HUNDRED, AgedPriority())
    for name, priority in (("late", 2), ("soon", 0), ("later", 1)):
        urgent.submit(GangJob(name, 100, priority=priority))
    order = []
    for now in range(3):
        order += started(urgent, now)
        urgent.finish(order[-1], now + 0.5)
    assert order == ["soon", "later", "late"]
    shares = GangScheduler(HUNDRED, FairShare({"a": 1, "b": 1}), backfill=False)
    for number in range(4):
        shares.submit(GangJob(f"a{number}", 100, tenant="a", seconds=10))
    shares.submit(GangJob("b0", 100, tenant="b", seconds=10), 1)
    assert started(shares, 1) == ["a0"]
    shares.finish("a0", 11)
    assert started(shares, 11) == ["b0"]


def test_resizing():
    scheduler = GangScheduler(SMALL)
    job = GangJob("x", 8, mesh=MeshShape.of(dp=4, tp=2), min_gpus=4)
    scheduler.submit(job)
    scheduler.submit(GangJob("y", 4))
    assert started(scheduler, 0) == ["x", "y"]
    less = replace(job, gpus=4, mesh=MeshShape.of(dp=2, tp=2))
    assert len(scheduler.resize(less, 1).gpus) == 4 and scheduler.free.free == 8
    refused = scheduler.resize(replace(job, gpus=2, mesh=MeshShape.of(tp=2), min_gpus=None), 2)
    assert isinstance(refused, Refused) and "4 GPUs or more: 2 too few" in refused.reason
    more = replace(job, gpus=16, mesh=MeshShape.of(dp=8, tp=2))
    assert "no room for 16 GPUs now: 12 are free that it could use" in scheduler.resize(more, 3).reason
    assert scheduler.running["x"].job == less
    scheduler.check_invariants()
    assert "16: 16 too many" in scheduler.resize(replace(job, gpus=32, mesh=MeshShape.of(dp=16, tp=2)), 3).reason
    scheduler.submit(GangJob("z", 16, min_gpus=8), 4)
    assert scheduler.resize(GangJob("z", 8), 4) is None and started(scheduler, 4) == ["z"]


def test_a_gang_on_a_drained_gpu_stays_there_if_it_cannot_be_resized():
    """It would not get the drained GPU back."""
    scheduler = GangScheduler(SMALL)
    job = GangJob("x", 16)
    scheduler.submit(job)
    assert started(scheduler, 0) == ["x"]
    scheduler.drain([3])
    assert "no room for 16 GPUs now: 15" in scheduler.resize(job, 1).reason
    with pytest.raises(NotFree, match="GPU 3"):
        scheduler.move(GangPlacement(job, tuple(range(16))))
    scheduler.check_invariants()
    assert scheduler.running["x"].gpus == tuple(range(16))


def test_growing_does_not_take_what_is_kept_for_the_head():
    scheduler = GangScheduler(SMALL)
    for job in (GangJob("x", 4, seconds=1000), GangJob("y", 8, seconds=10), GangJob("head", 12)):
        scheduler.submit(job)
    assert started(scheduler, 0) == ["x", "y"] and scheduler.reservation.time == 10
    assert isinstance(scheduler.resize(GangJob("x", 8, seconds=1000), 1), Refused)
    scheduler.finish("y", 10)
    assert started(scheduler, 10) == ["head"]


def test_moving():
    scheduler = GangScheduler(SMALL)
    for name in ("x", "y"):
        scheduler.submit(GangJob(name, 4))
    scheduler.start(0)
    x, y = scheduler.running["x"], scheduler.running["y"]
    away = GangPlacement(x.job, (*x.gpus[2:], 14, 15))
    scheduler.move(away)
    scheduler.check_invariants()
    assert scheduler.running["x"] == away and scheduler.free.is_free(x.gpus[0])
    with pytest.raises(NotFree, match=f"GPU {y.gpus[0]} is no free one"):
        scheduler.move(GangPlacement(x.job, (*x.gpus[:3], y.gpus[0])))
    with pytest.raises(InvalidJob, match="resize"):
        scheduler.move(GangPlacement(GangJob("x", 2), (14, 15)))
    scheduler.check_invariants()


def test_bad_input():
    scheduler = GangScheduler(SMALL)
    scheduler.submit(GangJob("x", 17))
    scheduler.submit(GangJob("y", 16))
    for name in ("x", "y"):
        with pytest.raises(InvalidJob, match="submitted already"):
            scheduler.submit(GangJob(name, 1))
    for action in (scheduler.finish, scheduler.preempt):
        with pytest.raises(UnknownJob, match="is not here"):
            action("z", 0)
    with pytest.raises(UnknownJob, match="waits, and does not run"):
        scheduler.preempt("y", 0)
    scheduler.finish("y", 0)
    assert scheduler.waiting == [] and scheduler.start(0) == []


def test_a_promise_counts_the_restart_of_a_job_that_lost_all():
    """A job of 100 s keeps nothing and loses its host at 50: it runs anew for 30 + 100 s, again after each loss, and
    who waits for it is promised no earlier start."""
    scheduler = GangScheduler(GpuCluster.regular(1, 2, 8))
    scheduler.submit(GangJob("a", 16, seconds=100, restart_seconds=30))
    scheduler.start(0.0)
    for now in (50.0, 60.0):
        assert scheduler.fail([3], now) == ["a"]
        scheduler.restore([3])
        assert len(scheduler.start(now)) == 1
    scheduler.submit(GangJob("b", 8, seconds=10), 60.0)
    assert scheduler.start(60.0) == [] and scheduler.reservation.time == 60 + 30 + 100
