"""Histograms: quantiles within the known error of numpy's exact ones, merges that lose nothing, weights that count."""

import math
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilib.mechanisms.telemetry import Histogram

values = st.lists(st.floats(0, sys.float_info.max) | st.floats(0.001, 1000) | st.integers(0, 10**12), min_size=1)
growths = st.sampled_from([1.001, 1.02, 1.1, 2.0, 10.0])
shares = st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0])


@given(values, growths, shares)
@example([5e-324, sys.float_info.max], 1.1, 1.0)
@example([5e-324], 10.0, 0.5)
@example([1.1**7] * 3, 1.1, 0.5)
@example([0, 0, 1], 1.1, 0.5)
def test_a_quantile_is_within_the_known_error_of_the_exact_one(numbers, growth, q):
    histogram = Histogram.of(numbers, growth)
    exact = float(np.quantile(np.array(numbers, dtype=float), q, method="inverted_cdf"))
    assert abs(histogram.quantile(q) - exact) <= (histogram.error + 1e-9) * exact
    histogram.check_invariants()


@given(st.lists(values, min_size=1, max_size=5), growths)
def test_merged_parts_are_the_histogram_of_all(parts, growth):
    merged = Histogram.merged(Histogram.of(part, growth) for part in parts)
    whole = Histogram.of([value for part in parts for value in part], growth)
    assert merged.buckets() == whole.buckets() and merged.count == whole.count
    assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)
    assert merged.total == pytest.approx(whole.total)
    assert [merged.quantile(q / 20) for q in range(21)] == [whole.quantile(q / 20) for q in range(21)]
    merged.check_invariants()


def test_the_error_is_reached_and_not_exceeded():
    """A value at either end of its bucket is as far from the estimate as any can be."""
    for growth, error in ((1.1, 0.0476), (1.02, 0.0099), (2.0, 0.3333)):
        histogram = Histogram.of([growth**4.001, growth**5, growth**9], growth)
        assert histogram.error == pytest.approx(error, abs=1e-4)
        assert abs(histogram.quantile(0.5) / growth**5 - 1) == pytest.approx(histogram.error, rel=1e-6)
        assert histogram.quantile(0.3) / growth**4.001 - 1 == pytest.approx(histogram.error, rel=0.02)


def test_parts_stay_as_they_are_and_a_histogram_merges_with_itself():
    part = Histogram.of([1, 2, 3])
    merged = Histogram.merged([part, part])
    assert (part.count, merged.count, merged.total) == (3, 6, 12)
    part.merge(part)
    assert part.buckets() == merged.buckets() and (part.count, part.total) == (6, 12)


def test_a_weight_counts_as_often_as_it_says():
    weighted, repeated = Histogram(), Histogram.of([0, 1, *[2] * 98])
    for value, weight in ((0, 1), (1, 1), (2, 98.0)):
        weighted.add(value, weight)
    assert weighted.buckets() == repeated.buckets() and weighted.mean == repeated.mean == 1.97
    assert [weighted.quantile(q) for q in (0, 0.01, 0.015, 0.03)] == pytest.approx([0, 0, 1, 2], rel=weighted.error)


def test_no_value_has_no_quantile_and_buckets_are_few():
    empty = Histogram()
    assert math.isnan(empty.quantile(0.5)) and math.isnan(empty.mean) and empty.buckets() == []
    empty.check_invariants()
    assert Histogram.of([0.0]).quantile(1) == 0 and Histogram.of([0.0]).buckets() == [(0.0, 1)]
    wide = Histogram.of(10**exponent for exponent in np.linspace(-6, 3, 20_000))
    assert len(wide.buckets()) <= 9 * math.log(10) / math.log(1.1) + 2


@pytest.mark.parametrize("value", [-1, -1e-300, math.nan, math.inf, 10**400, "1", None])
def test_what_is_no_duration_is_refused_and_changes_nothing(value):
    histogram = Histogram.of([1])
    with pytest.raises(ValueError, match="finite and 0 or more"):
        histogram.add(value)
    assert histogram.count == 1 and histogram.buckets() == Histogram.of([1]).buckets()


def test_bad_arguments_are_named():
    for growth in (1, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 1"):
            Histogram(growth)
    with pytest.raises(ValueError, match="1.1 and 1.2"):
        Histogram(1.1).merge(Histogram(1.2))
    with pytest.raises(ValueError, match="got none"):
        Histogram.merged([])
    for weight in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight"):
            Histogram().add(1, weight)
    for q in (-0.1, 1.1, math.nan, 99):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Histogram.of([1]).quantile(q)


def test_the_mean_of_percentiles_is_wrong_in_both_directions():
    """Of four replicas one is slow: it has one in 600 of the requests, then nearly all of them."""
    quick, slow = [1.0] * 10_000, [100.0] * 50
    idle = [Histogram.of(part) for part in (quick, quick, quick, slow)]
    busy = [Histogram.of(part) for part in ([1.0] * 100,) * 3 + ([100.0] * 10_000,)]
    for parts, exact, mean in ((idle, 1, 25.75), (busy, 100, 25.75)):
        p99 = Histogram.merged(parts).quantile(0.99)
        assert p99 == pytest.approx(exact, rel=parts[0].error)
        assert sum(part.quantile(0.99) for part in parts) / 4 == pytest.approx(mean, rel=parts[0].error)
