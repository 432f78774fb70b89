"""Three ways to lose a tail: averaged percentiles, sampling at the head, and leaves that are looked at alone."""

import math
import statistics
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.classic.observed_service.fan_out import leaf_for_root, slow_at_root, slow_shares
from minilib.classic.observed_service.shop import observe
from minilib.mechanisms.telemetry import HeadSampler, Histogram, TailSampler, expected_kept, rest_rate


@cache
def canary():
    return observe("slow canary", 1600)


def mean_and_merged_p99(observation, service):
    """The mean of the instances' p99, and the p99 of all requests, in ns."""
    parts = [observation.red[process].durations for process in observation.instances_of(service)]
    return statistics.fmean(part.quantile(0.99) for part in parts), Histogram.merged(parts).quantile(0.99)


def test_a_mean_of_percentiles_is_wrong_in_both_directions():
    """A slow canary with half a percent of the requests; a slow replica of eight with an eighth of them."""
    mean, p99 = mean_and_merged_p99(canary(), "recommend")
    assert mean > 5 * p99 and p99 < 6e6
    eighth = observe("slow replica", 240, replicas=8)
    mean, p99 = mean_and_merged_p99(eighth, "recommend")
    assert mean < p99 / 3 and p99 > 60e6
    exact = sorted(span.duration_ns for span in eighth.spans if span.name == "recommend")
    assert p99 == pytest.approx(exact[math.ceil(0.99 * len(exact)) - 1], rel=Histogram(1.05).error)


def test_head_sampling_loses_the_slow_traces_and_tail_sampling_at_its_volume_keeps_all():
    traces = canary().traces()
    slow = {trace.trace_id for trace in traces if trace.duration_ns > 50e6}
    assert len(slow) == 8
    head, tail = HeadSampler(0.01), TailSampler(slow_ns=50_000_000, rate=rest_rate(0.01, len(slow) / len(traces)))
    by_head = {trace.trace_id for trace in traces if head.weight(trace.trace_id)}
    weights = {t.trace_id: weight for t in traces if (weight := tail.weight(t.trace_id, t.duration_ns))}
    expected, deviation = expected_kept(len(slow), 0.01)
    assert expected == pytest.approx(0.08) and len(slow & by_head) <= expected + 4 * deviation
    assert slow <= set(weights)
    volume, deviation = expected_kept(len(traces), 0.01)
    assert abs(len(weights) - volume) <= 4 * deviation and abs(len(by_head) - volume) <= 4 * deviation
    rest, deviation = expected_kept(len(traces) - len(slow), tail.rate)
    assert abs(sum(weights.values()) - len(traces)) <= 4 * deviation / tail.rate


@pytest.mark.parametrize(("leaves", "requests"), [(1, 400), (8, 200), (32, 100)])
def test_one_slow_leaf_in_a_hundred_is_many_slow_requests(leaves, requests):
    """Within 4 standard deviations of the closed form, in the shop and in the durations of its root."""
    traces = observe("slow leaves", requests, shards=leaves).traces()
    leaf, root = slow_shares(traces, "store", 50e6)
    for seen, expected, count in ((leaf, 0.01, leaves * requests), (root, slow_at_root(0.01, leaves), requests)):
        assert abs(seen - expected) <= 4 * math.sqrt(expected * (1 - expected) / count)
    assert root == sum(trace.duration_ns > 50e6 for trace in traces) / requests, "who has a slow leaf waits for it"


def test_the_closed_form_and_its_inverse():
    assert slow_at_root(0.01, 1) == pytest.approx(0.01) and slow_at_root(0.01, 100) == pytest.approx(1 - 0.99**100)
    assert slow_at_root(0.01, 16_384) == pytest.approx(1) and slow_at_root(1e-18, 10) == pytest.approx(1e-17)
    assert (slow_at_root(0, 5), slow_at_root(1, 5), slow_at_root(1, 0), slow_at_root(0.5, 0)) == (0, 1, 0, 0)
    assert leaf_for_root(0.01, 100) == pytest.approx(1.005e-4, rel=1e-3)


@given(st.floats(0, 0.99), st.integers(1, 20_000))
def test_the_inverse_leads_back(share, leaves):
    assert slow_at_root(leaf_for_root(share, leaves), leaves) == pytest.approx(share, abs=1e-12)


def test_bad_arguments_are_named():
    for arguments in ((-0.1, 1), (1.1, 1), (math.nan, 1), (0.5, -1)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            slow_at_root(*arguments)
    for arguments in ((1, 1), (-0.1, 1), (math.nan, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="below 1"):
            leaf_for_root(*arguments)
    with pytest.raises(ValueError, match="no span is named 'stoer'"):
        slow_shares(observe("healthy", 5).traces(), "stoer", 1e6)
