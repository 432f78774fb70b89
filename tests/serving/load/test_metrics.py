"""Latencies, rates and goodput against numbers that one can see, and against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.serving.load.metrics import SLO, RequestTimes, ServingMetrics, goodput, highest_good_rate, slo_attainment


def test_one_request_in_numbers():
    times = RequestTimes(10.0, (10.5, 10.75, 11.5), 11.5)
    assert (times.ttft, times.itls, times.tpot, times.e2e) == (0.5, [0.25, 0.75], 0.5, 1.5)
    metrics = ServingMetrics.of([times])
    assert (metrics.completed, metrics.failed, metrics.output_tokens, metrics.duration) == (1, 0, 3, 1.5)
    assert metrics.request_throughput == 1 / 1.5 and metrics.output_throughput == 2.0
    assert (metrics.ttft.p50, metrics.ttft.p99, metrics.ttft.mean) == (0.5, 0.5, 0.5)
    assert (metrics.itl.p50, metrics.itl.p90) == (0.5, 0.25 + 0.9 * 0.5)
    assert (metrics.tpot.p99, metrics.e2e.p90) == (0.5, 1.5)


def test_no_token_and_one_token():
    none, one = RequestTimes(1.0, (), 3.0), RequestTimes(1.0, (2.0,), 2.0)
    assert (none.ttft, none.itls, none.tpot, none.e2e) == (None, [], None, 2.0)
    assert (one.ttft, one.itls, one.tpot, one.e2e) == (1.0, [], None, 1.0)
    metrics = ServingMetrics.of([none, one])
    assert metrics.completed == 2 and metrics.output_tokens == 1
    assert metrics.ttft.p50 == 1.0 and metrics.itl is None and metrics.tpot is None and metrics.e2e.p50 == 1.5
    assert ServingMetrics.of([none]).ttft is None
    assert SLO().met_by(one) and not SLO().met_by(none), "an answer without a token is no answer"
    assert SLO(tpot=1e-9).met_by(one), "as vLLM has it: without a gap there is none too long"


def test_long_answers_weigh_more_in_itl_and_not_in_tpot():
    long, short = RequestTimes(0, tuple(range(1, 102)), 101), RequestTimes(0, (1, 11), 11)
    metrics = ServingMetrics.of([long, short])
    assert metrics.itl.p50 == 1 and metrics.itl.mean == (100 + 10) / 101
    assert metrics.tpot.p50 == metrics.tpot.mean == 5.5


def test_failed_requests_are_counted_and_nothing_else():
    good, bad = RequestTimes(0.0, (1.0, 2.0), 2.0), RequestTimes(0.0, (1.5, 9.0), 10.0, "aborted")
    metrics = ServingMetrics.of([good, bad])
    assert (metrics.completed, metrics.failed, metrics.output_tokens, metrics.duration) == (1, 1, 2, 10.0)
    assert metrics.ttft.p99 == 1.0 and metrics.e2e.p99 == 2.0 and metrics.request_throughput == 0.1
    assert goodput([good, bad], SLO()) == 0.1 and slo_attainment([good, bad], SLO()) == 0.5
    only = ServingMetrics.of([bad])
    assert only.completed == 0 and only.ttft is only.e2e is None and only.output_throughput == 0


def test_rates_of_no_time():
    instant = RequestTimes(1.0, (1.0,), 1.0)
    assert ServingMetrics.of([instant]).request_throughput == math.inf
    assert ServingMetrics.of([RequestTimes(1.0, (), 1.0, "refused")]).request_throughput == 0.0


@pytest.mark.parametrize(
    "slo, met",
    [
        (SLO(), True),
        (SLO(ttft=0.5), True),
        (SLO(ttft=0.49), False),
        (SLO(tpot=0.5), True),
        (SLO(tpot=0.49), False),
        (SLO(e2e=1.5), True),
        (SLO(e2e=1.49), False),
        (SLO(0.5, 0.5, 1.5), True),
        (SLO(0.5, 0.49, 1.5), False),
    ],
)
def test_all_of_an_slo_must_hold_and_a_limit_may_be_reached(slo, met):
    times = RequestTimes(10.0, (10.5, 10.75, 11.5), 11.5)
    assert slo.met_by(times) is met
    assert goodput([times], slo) == pytest.approx(met / 1.5) and slo_attainment([times], slo) == met


def test_the_highest_good_rate_stops_at_the_first_that_fails():
    measured = {4.0: 0.85, 1.0: 1.0, 2.0: 0.9, 8.0: 0.95}
    assert highest_good_rate(measured) == 2.0, "that 8 requests a second went well once proves nothing"
    assert highest_good_rate(measured, 0.95) == 1.0
    assert highest_good_rate({1.0: 0.5}) == 0.0 and highest_good_rate({1.0: 1.0}, 1.0) == 1.0
    for wrong in ({}, {1.0: 1.0}):
        with pytest.raises(ValueError, match="one rate or more and a share"):
            highest_good_rate(wrong, 0.9 if not wrong else 1.1)


@given(st.lists(st.tuples(st.floats(0, 10), st.lists(st.floats(0, 5), max_size=6)), min_size=1, max_size=20))
def test_percentiles_are_numpys(rows):
    times = []
    for due, gaps in rows:
        moments = tuple((due + np.cumsum(gaps)).tolist())
        times.append(RequestTimes(due, moments, moments[-1] if moments else due))
    metrics = ServingMetrics.of(times)
    for delay, values in (
        (metrics.ttft, [one.ttft for one in times if one.token_times]),
        (metrics.itl, np.concatenate([np.diff(one.token_times) for one in times])),
        (metrics.tpot, [np.diff(one.token_times).mean() for one in times if len(one.token_times) > 1]),
        (metrics.e2e, [one.ended - one.due for one in times]),
    ):
        if not len(values):
            assert delay is None
            continue
        found = (delay.mean, delay.p50, delay.p90, delay.p99)
        assert found == pytest.approx((np.mean(values), *np.percentile(values, [50, 90, 99])), abs=1e-9)
    assert metrics.output_tokens == sum(len(gaps) for _, gaps in rows)


@pytest.mark.parametrize(
    "times",
    [(1.0, (0.5,), 2.0), (1.0, (3.0, 2.0), 4.0), (1.0, (2.0,), 1.5), (math.nan, (), 1.0), (0.0, (1.0,), math.inf)],
)
def test_times_that_cannot_be_are_refused(times):
    with pytest.raises(ValueError, match="finite and in this order"):
        RequestTimes(*times)


@pytest.mark.parametrize("name", ["ttft", "tpot", "e2e"])
@pytest.mark.parametrize("limit", [0, -1, math.nan])
def test_limits_that_nothing_meets_are_refused(name, limit):
    with pytest.raises(ValueError, match=f"{name} is a number of seconds > 0"):
        SLO(**{name: limit})


def test_nothing_has_no_metrics():
    for of in (ServingMetrics.of, lambda times: goodput(times, SLO()), lambda times: slo_attainment(times, SLO())):
        with pytest.raises(ValueError, match="one request or more"):
            of([])
