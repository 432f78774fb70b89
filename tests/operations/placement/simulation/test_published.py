"""Traces drawn after published ones have the quoted shares of jobs and of GPU time, and the quoted median."""

import statistics

import pytest

from minilib.operations.placement.simulation.published import DrawnJobs, TraceShape, UnknownShape, published_shape
from minilib.operations.placement.simulation.traced_job import with_estimates

JOBS_BAND, TIME_BAND = 0.1, 0.1  # points of percent
MEDIAN_BAND = 0.1  # of the quoted median


@pytest.mark.parametrize("name", ["philly", "helios", "seren"])
@pytest.mark.parametrize("seed", [0, 7])
def test_shares_are_the_quoted_ones(name, seed):
    shape = published_shape(name)
    assert sum(shape.jobs.values()) == pytest.approx(100, abs=0.2)
    assert sum(shape.gpu_time.values()) == pytest.approx(100, abs=0.2)
    trace = shape.draw(10_000, 1024, 0.85, seed)
    total = sum(each.job.gpus * each.seconds for each in trace)
    for gpus in shape.jobs:
        runs = [each.seconds for each in trace if each.job.gpus == gpus]
        assert 100 * len(runs) / len(trace) == pytest.approx(shape.jobs[gpus], abs=JOBS_BAND)
        assert 100 * gpus * sum(runs) / total == pytest.approx(shape.gpu_time[gpus], abs=TIME_BAND)
    assert statistics.median(each.seconds for each in trace) == pytest.approx(shape.median_seconds, rel=MEDIAN_BAND)
    assert max(each.seconds for each in trace) <= shape.longest_seconds
    assert total / len(trace) == pytest.approx(shape.gpu_seconds, rel=0.02)


def test_the_load_is_that_of_what_comes():
    for load in (0.5, 0.9):
        trace = published_shape("seren").draw(2_000, 256, load, longest_seconds=3_600, most_gpus=64)
        span = trace[-1].arrival
        assert sum(each.job.gpus * each.seconds for each in trace) / (256 * span) == pytest.approx(load, rel=0.02)
        assert max(each.job.gpus for each in trace) == 64 and max(each.seconds for each in trace) == 3_600
        assert [each.arrival for each in trace] == sorted(each.arrival for each in trace)


def test_seeds_decide_and_repeat():
    shape = published_shape("philly")
    assert shape.draw(100, 64, 0.8, 1) == shape.draw(100, 64, 0.8, 1) != shape.draw(100, 64, 0.8, 2)
    assert shape.draw(0, 64, 0.8) == [] and len(shape.draw(1, 64, 0.8)) == 1


def test_what_jobs_have_beside():
    beside = DrawnJobs(tenants=3, priorities=2, host_gpus=4, segment=8, checkpoint_every=None, restart_seconds=60)
    trace = published_shape("helios").draw(3_000, 256, 0.8, beside=beside)
    assert {each.job.gpus_per_host for each in trace} == {1, 2, 4}
    assert {each.job.segment for each in trace} == {None, 8} and {each.job.priority for each in trace} == {0, 1}
    tenants = statistics.multimode(each.job.tenant for each in trace)
    assert tenants == ["tenant0"] and {each.job.tenant for each in trace} == {"tenant0", "tenant1", "tenant2"}
    assert all(each.job.checkpoint_every is None and each.job.restart_seconds == 60 for each in trace)
    anywhere = published_shape("helios").draw(10, 256, 0.8, beside=DrawnJobs(host_gpus=None))
    assert {each.job.gpus_per_host for each in anywhere} == {None}


def test_estimates():
    trace = published_shape("philly").draw(50, 64, 0.8)
    assert all(each.job.seconds == each.seconds for each in trace)
    assert all(each.job.seconds == 3 * each.seconds for each in with_estimates(trace, 3))


def test_a_shape_of_equal_runs_has_no_spread():
    shape = TraceShape("flat", {2: 1}, {2: 1}, 20, 30, 100)  # its mean run is 10 s, and no spread lifts the median
    assert shape.spread < 1e-6 and {each.seconds for each in shape.draw(20, 8, 1.0)} == {10}


def test_bad_shapes_and_numbers_are_named():
    with pytest.raises(UnknownShape, match="philly, helios, seren"):
        published_shape("kalos")
    with pytest.raises(ValueError, match="give both for each size"):
        TraceShape("x", {1: 1}, {2: 1}, 1, 1, 1)
    with pytest.raises(ValueError, match="share of jobs of 1 GPUs"):
        TraceShape("x", {1: 0}, {1: 1}, 1, 1, 1)
    with pytest.raises(ValueError, match="no job of 4 GPUs or fewer"):
        TraceShape("x", {8: 1}, {8: 1}, 1, 1, 1).draw(5, 4, 0.5)
    with pytest.raises(ValueError, match="load"):
        published_shape("philly").draw(5, 4, 0)
