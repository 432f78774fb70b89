"""Sampling: every process decides alike, shares are met, weights keep counts unbiased, the tail is lost or kept."""

import math
import statistics

import pytest

from minilib.mechanisms.telemetry import HeadSampler, Histogram, TailSampler, expected_kept, rest_rate

IDS = [f"{number:032x}" for number in range(20_000)]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_head_sampling_keeps_its_share_whatever_the_ids_look_like(rate):
    kept = sum(HeadSampler(rate).weight(trace_id) > 0 for trace_id in IDS)
    expected, deviation = expected_kept(len(IDS), rate)
    assert abs(kept - expected) <= 4 * deviation


def test_a_decision_rests_on_the_id_alone_and_a_higher_rate_keeps_the_same_and_more():
    kept = {rate: {trace_id for trace_id in IDS if HeadSampler(rate).weight(trace_id)} for rate in (0.01, 0.1, 0.5)}
    assert kept[0.01] < kept[0.1] < kept[0.5]
    assert kept[0.01] == {trace_id for trace_id in reversed(IDS) if HeadSampler(0.01).weight(trace_id)}


def test_tail_sampling_keeps_every_slow_or_failed_trace_at_the_volume_of_head_sampling():
    """20,000 requests, 0.5 % of them slow: at 1 % head sampling leaves about one slow one, tail sampling all 100."""
    slow = {trace_id for number, trace_id in enumerate(IDS) if number % 200 == 17}
    head, tail = HeadSampler(0.01), TailSampler(slow_ns=10**9, rate=rest_rate(0.01, 0.005))
    by_head = {trace_id: weight for trace_id in IDS if (weight := head.weight(trace_id))}
    by_tail = {i: weight for i in IDS if (weight := tail.weight(i, 2 * 10**9 if i in slow else 10**6))}
    assert slow <= set(by_tail), "all of them"
    expected, deviation = expected_kept(len(slow), 0.01)
    assert expected == 1 and len(slow & set(by_head)) <= expected + 4 * deviation
    volume, deviation = expected_kept(len(IDS), 0.01)
    assert abs(len(by_tail) - volume) <= 4 * deviation and abs(len(by_head) - volume) <= 4 * deviation
    assert sum(by_tail[i] for i in slow) == 100, "a slow trace stands for itself"
    assert TailSampler(10**9, 0.0).weight(IDS[0], 5, failed=True) == 1
    assert TailSampler(10**9, 0.0).weight(IDS[0], 10**9) == 1 and TailSampler(10**9, 0.0).weight(IDS[0], 10**9 - 1) == 0


def test_weights_keep_counts_unbiased():
    """Over 200 sets of ids the weighted count is right on average; by the central limit theorem to within 4 sigma."""
    sampler, size, estimates = TailSampler(slow_ns=100, rate=0.05), 200, []
    for begin in range(200):
        ids = [f"{begin}/{number}" for number in range(size)]
        estimates.append(sum(sampler.weight(i, 100 if number % 20 == 0 else 1) for number, i in enumerate(ids)))
    deviation = math.sqrt(190 * 0.05 * 0.95) / 0.05
    assert abs(statistics.fmean(estimates) - size) <= 4 * deviation / math.sqrt(len(estimates))
    assert statistics.stdev(estimates) == pytest.approx(deviation, rel=0.2), "as wide as a binomial distribution"


def test_a_weighted_histogram_has_the_quantiles_of_all_and_an_unweighted_one_has_not():
    durations = {trace_id: 100 if number % 200 == 17 else 1 for number, trace_id in enumerate(IDS)}
    sampler, weighted, plain = TailSampler(slow_ns=50, rate=rest_rate(0.01, 0.005)), Histogram(), Histogram()
    for trace_id, duration in durations.items():
        if weight := sampler.weight(trace_id, duration):
            weighted.add(duration, weight)
            plain.add(duration)
    assert weighted.quantile(0.99) == 1 and weighted.quantile(0.999) == 100
    assert plain.quantile(0.9) == 100, "half of what is kept is slow"


def test_bad_arguments_are_named():
    for rate in (-0.1, 1.1, math.nan):
        for make in (HeadSampler, lambda rate: TailSampler(1, rate), lambda rate: expected_kept(1, rate)):
            with pytest.raises(ValueError, match="between 0 and 1"):
                make(rate)
    with pytest.raises(ValueError, match="2.00% of the traces"):
        rest_rate(0.01, 0.02)
    with pytest.raises(ValueError, match="0 or more ns"):
        TailSampler(-1, 0.5)
    with pytest.raises(ValueError, match="0 or more"):
        expected_kept(-1, 0.5)
    assert rest_rate(1, 1) == 0 and rest_rate(0.01, 0.01) == 0 and rest_rate(1, 0.3) == 1
