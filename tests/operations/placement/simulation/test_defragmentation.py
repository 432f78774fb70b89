"""Moves that make room: a closed case, the cheapest by an exhaustive search, and none that does not help."""

import heapq
import itertools
import random

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.defragmentation import DefragmentingScheduler, plan_moves
from minilib.operations.placement.simulation.simulator import simulate_cluster
from minilib.operations.placement.simulation.traced_job import TracedJob


def placed(cluster, *jobs):
    """Jobs on hosts: (name, GPUs, host, restart_seconds)."""
    scheduler = GangScheduler(cluster, place=lambda job, free: where[job.name])
    where = {}
    for name, gpus, host, restart in jobs:
        job = GangJob(name, gpus, gpus_per_host=gpus, restart_seconds=restart, checkpoint_every=60)
        free = [gpu for gpu in scheduler.free.free_on(host)][:gpus]
        where[name] = GangPlacement(job, free)
        scheduler.submit(job)
        scheduler.start(0)
    return scheduler


def test_one_move_of_four_gpus_makes_room_for_eight():
    """Three hosts of 8 with 4 free each: the cheapest of three jobs moves, for 4 × 60 GPU-seconds."""
    scheduler = placed(GpuCluster.regular(1, 3, 8), ("a", 4, 0, 90), ("b", 4, 1, 60), ("c", 4, 2, 70))
    gang = GangJob("gang", 8, gpus_per_host=8)
    plan = plan_moves(gang, scheduler.free, scheduler.running)
    assert [step.job.name for step in plan.steps] == ["b"] and plan.gpu_seconds == 240
    assert plan.placement.gpus == tuple(range(8, 16)), "the gang takes the host that b leaves"
    plan.apply(scheduler)
    scheduler.check_invariants()
    assert plan_moves(gang, scheduler.free, scheduler.running).steps == ()


def test_no_move_that_does_not_help():
    scheduler = placed(GpuCluster.regular(1, 3, 8), ("a", 5, 0, 1), ("b", 5, 1, 1), ("c", 5, 2, 1))
    before = scheduler.running
    assert plan_moves(GangJob("gang", 8, gpus_per_host=8), scheduler.free, scheduler.running) is None
    assert plan_moves(GangJob("too many", 16), scheduler.free, scheduler.running) is None
    assert plan_moves(GangJob("fits", 9), scheduler.free, scheduler.running).steps == ()
    assert scheduler.running == before
    fits = placed(GpuCluster.regular(1, 3, 8), ("a", 4, 0, 1), ("b", 4, 1, 1), ("c", 4, 2, 1))
    gang = GangJob("gang", 8, gpus_per_host=8)
    assert plan_moves(gang, fits.free, fits.running, most_moves=0) is None
    assert plan_moves(gang, fits.free, fits.running, tries=0) is None
    assert plan_moves(gang, fits.free, {}) is None, "nobody may be moved"
    with pytest.raises(ValueError, match="tries"):
        plan_moves(gang, fits.free, fits.running, tries=-1)


def cheapest(hosts, size, jobs, needed):
    """Cost of the cheapest row of moves to other hosts after which so many hosts are free; None if there is none."""
    start = tuple(host for _, _, host, _ in jobs)
    heap, best = [(0, start)], {start: 0}
    while heap:
        cost, state = heapq.heappop(heap)
        if cost > best[state]:
            continue
        if hosts - len(set(state)) >= needed:
            return cost
        room = [
            size - sum(gpus for (_, gpus, _, _), on in zip(jobs, state, strict=True) if on == h) for h in range(hosts)
        ]
        for at, host in itertools.product(range(len(jobs)), range(hosts)):
            gpus, restart = jobs[at][1], jobs[at][3]
            if host != state[at] and room[host] >= gpus:
                after = (*state[:at], host, *state[at + 1 :])
                if cost + gpus * restart < best.get(after, 1e9):
                    best[after] = cost + gpus * restart
                    heapq.heappush(heap, (best[after], after))
    return None


@pytest.mark.parametrize("live", [False, True])
def test_plans_are_the_cheapest_there_are(live):
    """Against a search over all states, in which jobs may be moved several times: no plan is dearer, none is missed."""
    chance, helped = random.Random(5), 0
    for _ in range(200):
        hosts, size = chance.choice((3, 4)), 4
        room, jobs = [size] * hosts, []
        for number in range(chance.randrange(2, 7)):
            gpus, host = chance.randrange(1, 4), chance.randrange(hosts)
            if room[host] >= gpus:
                room[host] -= gpus
                jobs.append((f"j{number}", gpus, host, chance.choice((10, 20, 50))))
        scheduler = placed(GpuCluster.regular(1, hosts, size), *jobs)
        needed = chance.choice((1, 2))
        gang = GangJob("gang", needed * size, gpus_per_host=size)
        best = cheapest(hosts, size, jobs, needed)
        plan = plan_moves(gang, scheduler.free, scheduler.running, live=live, most_moves=6, tries=1000)
        if best is None:
            assert plan is None
            continue
        helped += best > 0
        assert plan is not None and plan.gpu_seconds == best
        for step in plan.steps:
            if live:
                assert all(scheduler.free.is_free(gpu) for gpu in step.gpus), "it is nowhere in between"
            scheduler.move(step)
        scheduler.submit(gang)
        scheduler.place = GangScheduler(scheduler.cluster).place
        assert [each.job.name for each in scheduler.start(1)] == ["gang"]
        scheduler.check_invariants()
    assert helped > 40


def test_a_move_is_simulated_and_its_cost_counted():
    """Each host has a long job of 4; a gang of 8 comes at 10. One job moves, restarts for 5 s, and the gang starts."""
    cluster = GpuCluster.regular(1, 2, 8)
    # "x" holds the other half of the second host until 8, so that "a" and "b" stand on hosts of their own
    trace = [
        TracedJob(
            GangJob(name, gpus, gpus_per_host=4, seconds=seconds, checkpoint_every=10, restart_seconds=5), 0, seconds
        )
        for name, gpus, seconds in (("a", 4, 100), ("x", 4, 8), ("b", 4, 100))
    ] + [TracedJob(GangJob("gang", 8, gpus_per_host=8, seconds=20), 10, 20)]
    still = simulate_cluster(trace, GangScheduler(cluster))
    assert still.jobs[3].started == 100 and sum(record.moves for record in still.jobs) == 0
    scheduler = DefragmentingScheduler(cluster)
    moved = simulate_cluster(trace, scheduler)
    moved.check_invariants()
    assert moved.jobs[3].started == 10 and moved.restarting == 4 * 5 and moved.lost == 0
    assert sum(record.moves for record in moved.jobs) == 1 and len(scheduler.plans) == 1
    assert max(record.ended for record in moved.jobs) == 105


def test_a_move_that_costs_more_than_it_gains_is_left():
    trace = [
        TracedJob(GangJob(name, 4, gpus_per_host=4, seconds=s, checkpoint_every=10, restart_seconds=60), 0, s)
        for name, s in (("a", 100), ("x", 8), ("b", 100))
    ] + [TracedJob(GangJob("gang", 8, gpus_per_host=8, seconds=20), 75, 20)]
    scheduler = DefragmentingScheduler(GpuCluster.regular(1, 2, 8))
    assert simulate_cluster(trace, scheduler).jobs[3].started == 100 and scheduler.plans == []


def test_what_keeps_nothing_is_not_moved():
    trace = [
        TracedJob(GangJob(name, 4, gpus_per_host=4, seconds=s), 0, s) for name, s in (("a", 100), ("x", 8), ("b", 100))
    ]
    trace.append(TracedJob(GangJob("gang", 8, gpus_per_host=8, seconds=20), 10, 20))
    scheduler = DefragmentingScheduler(GpuCluster.regular(1, 2, 8))
    assert simulate_cluster(trace, scheduler).jobs[3].started == 100 and scheduler.plans == []


def test_nothing_is_changed_by_planning():
    scheduler = placed(GpuCluster.regular(1, 3, 8), ("a", 4, 0, 90), ("b", 4, 1, 60), ("c", 4, 2, 70))
    owners = [scheduler.free.owner(gpu) for gpu in range(24)]
    plan_moves(GangJob("gang", 8, gpus_per_host=8), scheduler.free, scheduler.running)
    assert [scheduler.free.owner(gpu) for gpu in range(24)] == owners
    scheduler.free.check_invariants()
