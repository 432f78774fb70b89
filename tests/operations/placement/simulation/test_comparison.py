"""Schedulers compared on one trace: rows, the promise of backfill, and what policies are for."""

import random

import pytest

from minilib.mechanisms.scheduling import UnknownPolicy
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.comparison import PLACINGS, ComparedScheduler, compare_schedulers
from minilib.operations.placement.simulation.consolidation import ConsolidatingScheduler
from minilib.operations.placement.simulation.host_failures import drawn_failures
from minilib.operations.placement.simulation.published import published_shape
from minilib.operations.placement.simulation.simulator import simulate_cluster
from minilib.operations.placement.simulation.traced_job import TracedJob, with_estimates

CLUSTER = GpuCluster.regular(4, 2, 8)


def some_trace(seed, jobs=250):
    return published_shape("helios").draw(jobs, CLUSTER.gpus, 1.2, seed, most_gpus=64, longest_seconds=7_200)


def first_promises(kind):
    """A scheduler that notes the first time that each job at the head of the line is promised."""

    class Noting(kind):
        def start(self, now):
            started = super().start(now)
            if self.reservation is not None:
                self.__dict__.setdefault("promised", {}).setdefault(self.reservation.name, self.reservation.time)
            return started

    return Noting(CLUSTER)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [GangScheduler, ConsolidatingScheduler])
@pytest.mark.parametrize("factor", [1, 4])
def test_backfill_never_delays_the_head(seed, kind, factor):
    """Estimates are exact, or longer than runs: each first promise is kept."""
    chance, scheduler = random.Random(seed), first_promises(kind)
    trace = [
        TracedJob(GangJob(f"j{n}", gpus, min(gpus, 8), seconds=seconds), 60 * n, seconds)
        for n in range(250)
        for gpus, seconds in [(chance.choice((1, 2, 4, 8, 16, 32, 48)), chance.randrange(1, 500))]
    ]
    run = simulate_cluster(with_estimates(trace, factor), scheduler)
    run.check_invariants()
    started = {record.traced.job.name: record.started for record in run.jobs}
    assert len(scheduler.promised) > 20
    for name, time in scheduler.promised.items():
        assert started[name] <= time, f"{name} was promised {time} and started at {started[name]}"


def test_backfill_lets_small_jobs_ahead_and_nobody_is_later_for_it():
    """Hand-made: 8 of 16 GPUs run until 100, a gang of 16 waits for it, and a job of 8 ends before that."""
    jobs = [("first", 8, 100, 0), ("gang", 16, 50, 1), ("small", 8, 90, 2)]
    trace = [TracedJob(GangJob(name, gpus, 8, seconds=s), at, s) for name, gpus, s, at in jobs]
    compared = [ComparedScheduler(backfill=backfill) for backfill in (False, True)]
    without, with_it = compare_schedulers(trace, GpuCluster.regular(1, 2, 8), compared)
    starts = [[record.started for record in row.run.jobs] for row in (without, with_it)]
    assert starts == [[0, 100, 150], [0, 100, 2]]
    assert (without.makespan, with_it.makespan) == (240, 150) and with_it.utilisation > without.utilisation
    assert [row.name for row in (without, with_it)] == ["fcfs, best fit", "fcfs, backfill, best fit"]
    assert without.idle_wanted == pytest.approx(8 * 99 / (16 * 240))


def test_the_shortest_first_waits_less_and_priorities_are_heard():
    trace = some_trace(3)
    rows = {name: compare_schedulers(trace, CLUSTER, [ComparedScheduler(name)])[0]
            for name in ("fcfs", "srpt", "priority", "fair_share")}  # fmt: skip
    assert rows["srpt"].mean_wait < rows["fcfs"].mean_wait
    urgent = {name: [record.started - record.traced.arrival for record in rows[name].run.jobs
                     if record.traced.job.priority == 0] for name in ("fcfs", "priority")}  # fmt: skip
    assert sum(urgent["priority"]) < sum(urgent["fcfs"])
    useful = {row.run.useful for row in rows.values()}
    assert len(useful) == 1, "all did the same work"


def test_fair_share_serves_a_tenant_that_asks_for_little():
    """One tenant floods the line, another comes later with a few jobs."""
    flood = [TracedJob(GangJob(f"a{n}", 8, 8, tenant="a", seconds=100), 0, 100) for n in range(60)]
    few = [TracedJob(GangJob(f"b{n}", 8, 8, tenant="b", seconds=100), 50, 100) for n in range(3)]
    one, fair = compare_schedulers(flood + few, GpuCluster.regular(1, 2, 8),
                                   [ComparedScheduler("fcfs"), ComparedScheduler("fair_share")])  # fmt: skip
    last = [max(r.ended for r in row.run.jobs if r.traced.job.tenant == "b") for row in (one, fair)]
    assert last[0] == 3200 and last[1] <= 400 and fair.makespan == one.makespan
    assert fair.fairness < one.fairness, "means of slowdown: the flood's own jobs wait for each other"


@pytest.mark.parametrize("placing", PLACINGS)
def test_every_placing_runs_with_failures_and_adds_up(placing):
    trace = some_trace(1, 150)
    (row,) = compare_schedulers(trace, CLUSTER, [ComparedScheduler(placing=placing)],
                                lambda: drawn_failures(len(CLUSTER.hosts), 0.05, 600), after=100)  # fmt: skip
    assert row.run.lost > 0 and row.goodput < row.utilisation <= 1 and not row.run.unfinished
    assert row.run.useful == sum(each.job.gpus * each.seconds for each in trace)
    assert 0 <= row.largest.domain <= row.largest.rack <= row.largest.unit <= row.largest.anywhere <= CLUSTER.gpus
    assert row.moves == sum(len(record.runs) - 1 - record.failures for record in row.run.jobs)


def test_the_same_comes_out_twice():
    compared = [ComparedScheduler("srpt", placing="moves")]
    one, two = (compare_schedulers(some_trace(2, 120), CLUSTER, compared)[0] for _ in range(2))
    assert one[:-1] == two[:-1]


def test_nothing_compared_and_bad_names():
    assert compare_schedulers([], CLUSTER, []) == []
    (row,) = compare_schedulers([], CLUSTER, [ComparedScheduler()])
    assert (row.utilisation, row.mean_wait, row.makespan, row.largest.anywhere) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="first fit, best fit"):
        ComparedScheduler(placing="worst fit")
    with pytest.raises(UnknownPolicy):
        ComparedScheduler("luck")


def test_a_trace_in_which_no_time_passes_after_its_first_event():
    (row,) = compare_schedulers([TracedJob(GangJob("a", 1), 5, 0)], GpuCluster.regular(1, 1, 8), [ComparedScheduler()])
    assert (row.free, row.makespan) == (0, 0)
