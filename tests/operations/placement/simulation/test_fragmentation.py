"""The largest gang that fits, first fit beside it, what remains of racks, and a unit that is kept."""

import random

import pytest

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import best_placement
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.consolidation import ConsolidatingScheduler
from minilib.operations.placement.simulation.first_fit import first_fit
from minilib.operations.placement.simulation.fragmentation import LargestGangs, largest_gangs
from minilib.operations.placement.simulation.simulator import simulate_cluster
from minilib.operations.placement.simulation.traced_job import TracedJob
from minilib.ranks.mesh_shape import MeshShape

SMALL = GpuCluster.regular(4, 2, 8, racks_per_unit=2)
NVL72 = GpuCluster.regular(2, 18, 4, nvlink_domain=72, gpu="gb200")


def test_the_largest_gang_by_hand():
    free = FreeGpus(SMALL)
    assert largest_gangs(free) == LargestGangs(64, 32, 16, 8)
    free.take("a", [0])  # one GPU of a host: the host is no room for a worker of 8
    assert largest_gangs(free) == (56, 32, 16, 8)
    free.take("b", [32, 40])  # a host of each rack of the second unit
    assert largest_gangs(free) == (40, 24, 16, 8)
    free.take_out(range(16, 32), "failed")
    assert largest_gangs(free) == (24, 16, 16, 8) and largest_gangs(free).powers == (16, 16, 16, 8)
    free.take("c", [gpu for gpu in range(64) if free.is_free(gpu)])
    assert largest_gangs(free) == largest_gangs(free).powers == (0, 0, 0, 0)


def test_a_domain_of_trays():
    free = FreeGpus(NVL72)
    free.take("a", [0, 7])  # one GPU of each of two trays
    assert largest_gangs(free) == (136, 72, 72, 72)
    free.take("b", [72])
    assert largest_gangs(free) == (132, 68, 68, 68) and largest_gangs(free).powers.domain == 64


def test_first_fit_takes_the_lowest_numbers():
    free = FreeGpus(SMALL)
    assert first_fit(GangJob("a", 3), free).gpus == (0, 1, 2)
    free.take("a", [1, 8, 9])
    assert first_fit(GangJob("b", 9), free).gpus == (0, 2, 3, 4, 5, 6, 7, 10, 11)
    assert first_fit(GangJob("c", 8, gpus_per_host=8), free).gpus == tuple(range(16, 24))
    assert first_fit(GangJob("d", 8, gpus_per_host=4), free).gpus == (0, 2, 3, 4, 10, 11, 12, 13)
    assert first_fit(GangJob("e", 62), free) is None


@pytest.mark.parametrize("cluster", [SMALL, NVL72, GpuCluster.regular(3, 3, 4)])
def test_first_fit_starts_what_best_fit_starts(cluster):
    """Whatever is free, both place a job or both do not, and each placement is what the job asks for."""
    chance, both = random.Random(1), [0, 0]
    for _ in range(300):
        free = FreeGpus(cluster)
        free.take("others", chance.sample(range(cluster.gpus), chance.randrange(cluster.gpus)))
        tp, dp = chance.choice((1, 2, 4)), chance.choice((1, 2, 3, 6))
        mesh = MeshShape.of(dp=dp, tp=tp) if chance.random() < 0.5 else None
        segment = tp * dp if chance.random() < 0.3 else None
        job = GangJob("job", tp * dp, gpus_per_host=chance.choice((None, tp)), mesh=mesh, segment=segment)
        first, best = first_fit(job, free), best_placement(job, free)
        assert (first is None) == (best is None)
        both[first is None] += 1
        if first is not None:
            free.take("job", first.gpus)
            worker, together = job.on_one_host(cluster.largest_host), job.in_one_domain(cluster.largest_host)
            hosts, domains = (cluster.numbers_of(level, first.gpus) for level in ("host", "domain"))
            assert all(hosts.count(host) % worker == 0 for host in hosts)
            assert all(domains.count(domain) % together == 0 for domain in domains)
    assert min(both) > 20


def test_what_remains_of_racks_is_counted_as_idle():
    """Segments of 64 in domains of 72: 8 of each 72 GPUs are never had, though somebody always waits."""
    trace = [TracedJob(GangJob(f"j{n}", 64, 4, segment=64, seconds=100), 0, 100) for n in range(10)]
    run = simulate_cluster(trace, GangScheduler(NVL72), until=500)
    run.check_invariants()
    assert run.utilisation == 64 / 72 and run.seconds.idle_wanted == 2 * 8 * 400
    assert run.seconds.idle == 2 * 8 * 100, "in the last 100 s nobody waits"
    thirds = [TracedJob(GangJob(f"j{n}", 24, 4, segment=24, seconds=100), 0, 100) for n in range(30)]
    assert simulate_cluster(thirds, GangScheduler(NVL72)).utilisation == 1, "72 is three times 24"


def test_consolidation_clears_hosts_of_a_unit_within_its_share():
    """Four jobs of 1 GPU, each on a host of its own: two units of two hosts. What moves leaves whole hosts free."""
    cluster = GpuCluster.regular(4, 1, 8, racks_per_unit=2)
    trace = [
        TracedJob(GangJob(name, gpus, gpus, seconds=s, checkpoint_every=60, restart_seconds=30), 0, s)
        for n in range(4)
        for name, gpus, s in ((f"small{n}", 1, 40_000), (f"large{n}", 7, 100))
    ] + [TracedJob(GangJob(f"tick{n}", 1, 1, seconds=1), 1000 * (n + 1), 1) for n in range(30)]
    still, moved = (
        simulate_cluster(trace, GangScheduler(cluster)),
        simulate_cluster(trace, scheduler := ConsolidatingScheduler(cluster)),
    )
    moved.check_invariants()
    scheduler.check_invariants()
    late = [next(one.largest for one in reversed(run.instants) if one.now < 35_000) for run in (still, moved)]
    assert late[0].anywhere == 0
    assert (late[1].unit, late[1].anywhere) == (16, 24), "one unit is clear, and the other is packed"
    moves = sum(record.moves for record in moved.jobs)
    assert moves == 3 and scheduler.spent == moves * 30 == moved.restarting <= 0.005 * moved.capacity
    none = simulate_cluster(trace, ConsolidatingScheduler(cluster, share=0))
    assert sum(record.moves for record in none.jobs) == 0
    with pytest.raises(ValueError, match="share"):
        ConsolidatingScheduler(cluster, share=-1)


def test_a_job_of_two_hosts_leaves_the_unit_that_is_kept():
    """It came when the other unit was full; when that is free, the job moves there as a whole."""
    cluster = GpuCluster.regular(4, 1, 8, racks_per_unit=2)
    trace = [
        TracedJob(GangJob(name, 16, 8, seconds=s, checkpoint_every=60, restart_seconds=30), at, s)
        for name, at, s in (("first", 0, 20_000), ("second", 1, 40_000))
    ] + [TracedJob(GangJob("tick", 1, 1, seconds=1), 30_000, 1)]
    run = simulate_cluster(trace, scheduler := ConsolidatingScheduler(cluster))
    run.check_invariants()
    assert scheduler.spent == 16 * 30 and run.jobs[1].moves == 1
    assert run.jobs[1].runs[0].gpus == tuple(range(16)) and run.jobs[1].runs[1].gpus == tuple(range(16, 32))
