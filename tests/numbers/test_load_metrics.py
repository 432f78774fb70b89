"""Load metrics against NumPy and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.numbers.load_metrics import Delay, coefficient_of_variation, drop_rate, max_over_mean, quantile

COUNTS = st.lists(st.integers(0, 100), min_size=1, max_size=9)


@given(COUNTS)
@settings(max_examples=40)
def test_evenness_is_that_of_numpy(counts):
    array = np.array(counts)
    mean = array.mean()
    assert max_over_mean(counts) == max_over_mean(array) == pytest.approx(array.max() / mean if mean else 1)
    assert coefficient_of_variation(array) == pytest.approx(array.std() / mean if mean else 0)


@given(COUNTS, st.integers(0, 100))
@settings(max_examples=40)
def test_what_is_dropped_is_what_exceeds(counts, capacity):
    array = np.array(counts)
    expected = np.maximum(array - capacity, 0).sum() / max(1, array.sum())
    assert drop_rate(counts, capacity) == drop_rate(array, [capacity] * len(counts)) == pytest.approx(expected)


def test_capacities_may_differ():
    assert drop_rate([4, 4], [4, 2]) == 0.25
    with pytest.raises(ValueError, match="got 1 for 2"):
        drop_rate([4, 4], [4])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0, 1))
@settings(max_examples=40)
def test_quantiles_are_numpys(values, share):
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))
    delay = Delay.of(values)
    expected = (np.mean(values), *np.quantile(values, [0.5, 0.9, 0.99]))
    assert (delay.mean, delay.p50, delay.p90, delay.p99) == pytest.approx(expected)


def test_nothing_has_no_metrics():
    for empty in (max_over_mean, coefficient_of_variation, Delay.of):
        with pytest.raises(ValueError, match="or more"):
            empty([])
    with pytest.raises(ValueError, match="got 1 values and 1.5"):
        quantile([1], 1.5)
