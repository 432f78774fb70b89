"""Outliers: the ones that were moved are found, the others are not, and few, equal or strange values do no harm."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.telemetry import outliers


def test_a_slow_replica_among_few_is_found_where_three_sigma_cannot_see_it():
    seconds = [10.1, 9.9, 10.0, 50.0]
    assert outliers(seconds) == [3]
    deviations = [(value - statistics.fmean(seconds)) / statistics.stdev(seconds) for value in seconds]
    assert max(deviations) < (len(seconds) - 1) / math.sqrt(len(seconds)) == 1.5


@given(st.integers(5, 40), st.integers(0, 2**32), st.data())
def test_what_was_moved_far_is_found_and_nothing_else(size, seed, data):
    rng = random.Random(seed)
    values = [10 + rng.uniform(-1, 1) for _ in range(size)]
    moved = data.draw(st.sets(st.integers(0, size - 1), max_size=(size - 1) // 2))
    for position in moved:
        values[position] = 1000 + position
    assert outliers(values, floor=2.1) == sorted(moved)


def test_normal_noise_seldom_raises_an_alarm_and_a_floor_none():
    """5 robust σ of 64 normal values; the floor is a distance that matters, such as 20 % of a step."""
    rng, alarms, above_floor = random.Random(0), 0, 0
    for _ in range(500):
        values = [rng.gauss(100, 1) for _ in range(64)]
        alarms += bool(outliers(values))
        above_floor += bool(outliers(values, floor=20))
    assert alarms <= 5 and above_floor == 0


def test_sides_tell_slow_from_early():
    waits = [30.0, 31.0, 29.0, 0.5, 30.5, 99.0]
    assert outliers(waits) == [3, 5]
    assert (outliers(waits, side="below"), outliers(waits, side="above")) == ([3], [5])


def test_equal_values_few_values_and_none():
    assert outliers([1, 1, 1, 1]) == [] == outliers([]) == outliers([7]) == outliers([1, 100])
    assert outliers([1, 1, 1, 1.001]) == [3], "without a floor any difference between equals counts"
    assert outliers([1, 1, 1, 1.001], floor=0.01) == []
    assert outliers([1, 1, 100, 100]) == [], "two halves: neither is the odd one"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"those at \[1, 2\]"):
        outliers([1.0, math.nan, math.inf])
    for arguments in ({"factor": 0}, {"factor": math.nan}, {"floor": -1}, {"floor": math.inf}):
        with pytest.raises(ValueError, match="factor"):
            outliers([1, 2, 3], **arguments)
    with pytest.raises(ValueError, match="both, above, below"):
        outliers([1, 2, 3], side="up")
