"""The simulator: cases worked out by hand, closed forms, what is conserved, and what happens at one instant."""

import random

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.host_failures import HostFailure, drawn_failures
from minilib.operations.placement.simulation.outcome import jain_index
from minilib.operations.placement.simulation.simulator import NeverEnds, simulate_cluster
from minilib.operations.placement.simulation.traced_job import TracedJob, with_estimates

ONE = GpuCluster.regular(1, 1, 8)
TWO = GpuCluster.regular(1, 2, 8)


def job(name, gpus, seconds, arrival=0, **more):
    return TracedJob(GangJob(name, gpus, seconds=more.pop("estimate", seconds or 1), **more), arrival, seconds)


def run(trace, cluster=ONE, failures=(), **more):
    found = simulate_cluster(trace, GangScheduler(cluster, backfill=more.pop("backfill", True)), failures, **more)
    found.check_invariants()
    return found


def test_nothing_and_one_job():
    empty = run([])
    assert (empty.span, empty.utilisation, empty.goodput, empty.makespan, empty.jobs) == (0, 0, 0, 0, [])
    assert empty.fairness_of_slowdown == empty.fairness_of_service == 1
    one = run([job("a", 4, 10, arrival=5)])
    assert (one.span, one.makespan, one.useful, one.capacity) == (15, 10, 40, 120)
    assert (one.seconds.idle, one.seconds.idle_wanted, one.seconds.busy) == (80, 0, 40)
    assert list(one.sets_that_ran()) == [(5, {"a"}), (15, set())] and one.running_at(14) == {"a"}


def test_deterministic_arrivals_wait_one_after_the_other():
    """D/D/1: every 10 s a job of 12 s on the whole cluster; the n-th waits 2n."""
    found = run([job(f"j{n}", 8, 12, 10 * n) for n in range(50)])
    assert found.first_waits() == [2 * n for n in range(50)]
    assert found.makespan == 50 * 12 and found.utilisation == 1


@pytest.mark.parametrize("servers", [1, 3])
def test_queues_of_equal_jobs_are_those_of_the_recursion(servers):
    """M/D/c, first come, first served: a job starts when it comes, or when the c-th before it ends."""
    chance, arrivals, at = random.Random(servers), [], 0
    for _ in range(300):
        at += round(chance.expovariate(1 / 11 * servers))
        arrivals.append(at)
    found = run([job(f"j{n}", 8, 10, at) for n, at in enumerate(arrivals)], GpuCluster.regular(1, servers, 8))
    starts = []
    for n, at in enumerate(arrivals):
        starts.append(max(at, starts[n - servers] + 10 if n >= servers else 0))
    assert [each.started for each in found.jobs] == starts and max(found.first_waits()) > 0


def test_a_loss_by_hand():
    """At 50 a host is lost for 10 s: 30 s of work are kept, 20 lost; 5 s of restart, and 70 s that are left."""
    trace = [job("a", 8, 100, checkpoint_every=30, restart_seconds=5)]
    found = run(trace, failures=[HostFailure(50, 0, 10)])
    (record,) = found.jobs
    assert (record.ended, record.failures, record.waited) == (135, 1, 10)
    assert (found.useful, found.lost, found.restarting, found.seconds.out) == (800, 160, 40, 80)
    assert found.seconds.idle == found.seconds.idle_wanted == 0 and found.seconds.down == 80
    assert found.goodput == 800 / (8 * 135)


def test_what_keeps_nothing_begins_anew():
    found = run([job("a", 8, 100)], failures=[HostFailure(99, 0, 1)])
    assert found.jobs[0].ended == 200 and found.lost == 99 * 8


def test_a_loss_at_a_checkpoint_and_one_during_the_restart():
    trace = [job("a", 8, 100, checkpoint_every=30, restart_seconds=5)]
    found = run(trace, failures=[HostFailure(60, 0, 0), HostFailure(63, 0, 0)])
    (record,) = found.jobs
    assert found.lost == 0 and found.restarting == 8 * (3 + 5) and record.ended == 60 + 3 + 5 + 40


def test_a_failure_at_the_instant_of_an_end_comes_too_late():
    found = run([job("a", 8, 100), job("b", 8, 10)], failures=[HostFailure(100, 0, 7)])
    assert [record.ended for record in found.jobs] == [100, 117] and found.lost == 0
    assert all(record.failures == 0 for record in found.jobs)


def test_every_host_is_down():
    failures = [HostFailure(10, 0, 20), HostFailure(10, 1, 30)]
    found = run([job("a", 8, 15), job("b", 16, 5, 12)], TWO, failures)
    assert [record.ended for record in found.jobs] == [45, 50]
    assert found.seconds.out == 8 * 20 + 8 * 30 and found.running_at(20) == set()
    never = run([job("a", 8, 15)], failures=[HostFailure(10, 0, 1e6)], until=100)
    assert never.unfinished == never.jobs and (never.lost, never.seconds.out, never.span) == (80, 720, 100)


def test_only_the_jobs_of_the_host_are_hit():
    found = run([job("a", 8, 100), job("b", 8, 100)], TWO, [HostFailure(50, 1, 1000)])
    assert [record.failures for record in found.jobs] == [0, 1]
    assert found.jobs[1].runs[1].gpus == tuple(range(8)) and found.jobs[1].runs[1].start == 100


def test_a_job_too_large_is_refused_and_counted():
    found = run([job("a", 9, 10), job("b", 8, 10)])
    assert [record.traced.job.name for record in found.refused] == ["a"] and "1 too many" in found.refused[0].refused
    assert found.jobs[1].ended == 10 and found.unfinished == [] and found.jobs[0].waited == 0


def test_arrivals_at_one_time_start_in_the_order_given():
    found = run([job(name, 8, 10, 3) for name in "cab"])
    assert [record.started for record in found.jobs] == [3, 13, 23]


def test_a_job_of_no_seconds_ends_as_it_starts():
    found = run([job("a", 8, 10), job("zero", 8, 0, 5), job("b", 8, 1, 5)])
    assert [record.ended for record in found.jobs] == [10, 10, 11] and found.jobs[1].waited == 5
    assert run([job("zero", 8, 0)]).span == 0


@pytest.mark.parametrize("seed", range(6))
def test_every_gpu_second_is_counted_once_and_little_holds_exactly(seed):
    chance = random.Random(seed)
    cluster = GpuCluster.regular(2, 2, 8)
    trace = [
        job(f"j{n}", chance.choice((1, 2, 4, 8, 16, 24)), chance.randrange(0, 900), chance.randrange(20_000),
            checkpoint_every=chance.choice((None, 60, 200)), restart_seconds=chance.choice((0, 30)), estimate=1000)
        for n in range(300)
    ]  # fmt: skip
    found = run(trace, cluster, drawn_failures(4, 0.3, 400, seed))
    seconds = found.seconds
    assert found.useful + found.lost + found.restarting == seconds.busy
    assert seconds.busy + seconds.idle + seconds.idle_wanted + seconds.out == found.capacity
    assert seconds.out == seconds.down > 0
    assert found.useful == sum(each.job.gpus * each.seconds for each in trace) and not found.unfinished
    assert sum(record.waited for record in found.jobs) == seconds.in_line > 0
    assert found.lost > 0 and found.restarting > 0 and sum(record.failures for record in found.jobs) > 5
    line = sum(
        (after.now - now.now) * now.waiting for now, after in zip(found.instants, found.instants[1:], strict=False)
    )
    assert line == seconds.in_line, "the line at each instant tells the same"
    for now, names in list(found.sets_that_ran())[::20]:
        assert names == found.running_at(now)


def test_a_run_is_cut_off():
    found = run([job("a", 8, 100), job("b", 8, 100), job("late", 8, 1, 70)], until=60)
    assert found.span == 60 and found.useful == 480 and len(found.unfinished) == 2 and len(found.jobs) == 2


def test_what_never_ends_is_named():
    with pytest.raises(NeverEnds, match="checkpoint_every"):
        simulate_cluster([job("a", 8, 100)], GangScheduler(ONE), (HostFailure(10 * n, 0, 1) for n in range(1, 10**9)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="share a name"):
        run([job("a", 8, 1), job("a", 8, 1)])
    with pytest.raises(ValueError, match="in order of time"):
        run([job("a", 8, 100)], TWO, [HostFailure(20, 0, 1), HostFailure(10, 1, 1)])
    with pytest.raises(ValueError, match="out already"):
        run([job("a", 8, 100)], failures=[HostFailure(20, 0, 10), HostFailure(25, 0, 1)])
    with pytest.raises(ValueError, match="numbered 0 to 0"):
        run([job("a", 8, 100)], failures=[HostFailure(20, 1, 10)])
    with pytest.raises(ValueError, match="arrival of a"):
        job("a", 8, 1, arrival=-1)
    with pytest.raises(ValueError, match="seconds of a"):
        TracedJob(GangJob("a", 8), 0, float("nan"))
    with pytest.raises(ValueError, match="factor"):
        with_estimates([], 0)
    with pytest.raises(ValueError, match="no instants"):
        run([job("a", 8, 1)], instants=False).mean_free()


def test_drawn_failures_have_their_rate_and_their_order():
    assert list(drawn_failures(3, 0, 60)) == []
    found, draws = [], drawn_failures(20, 0.05, 600, seed=3)
    while not found or found[-1].at < 3600 * 2000:
        found.append(next(draws))
    assert [each.at for each in found] == sorted(each.at for each in found)
    per_cycle = 20 * 2000 * 3600 / (72_000 + 600)  # a life of 20 hours on average, then the repair
    assert abs(len(found) - per_cycle) < 4 * per_cycle**0.5


def test_waits_by_size_and_fairness():
    found = run([job("a", 8, 100, tenant="x"), job("b", 1, 100, 50, tenant="y"), job("c", 8, 10, 60, tenant="x")])
    assert found.waits_by_size() == {"1": (1, 50, 50), "2–8": (2, 70, 126)}
    assert [record.slowdown for record in found.jobs] == [1, 1.5, 15]
    assert found.fairness_of_slowdown == pytest.approx((8 + 1.5) ** 2 / (2 * (64 + 2.25)))
    assert found.by_tenant(lambda jobs: sum(each.useful() for each in jobs)) == {"x": 880, "y": 100}
    assert jain_index([1, 0, 0, 0]) == 0.25 and jain_index([2, 2]) == 1 and jain_index([]) == jain_index([0, 0]) == 1


def test_means_over_time_by_hand():
    found = run([job("a", 8, 30), job("b", 1, 10, 40)], TWO)
    assert found.mean_free() == ((8 * 30 + 16 * 10 + 15 * 10) / 50, ((8 * 30 + 16 * 10 + 8 * 10) / 50,) * 3 + (8,))
    assert found.mean_free(after=40) == (15, (8, 8, 8, 8))


def test_the_bar_ends_full(capsys):
    run([job("a", 8, 10), job("b", 9, 10)], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_jains_index_of_tiny_and_of_huge_values():
    assert jain_index([1e200, 1e200]) == 1 and jain_index([1e-200, 0]) == 0.5
