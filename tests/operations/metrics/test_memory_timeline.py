"""Memory by phase and step: what grows is found, what only warms up or jumps is not."""

import gc

import numpy as np
import pytest
import torch

from minilib.operations.metrics.memory_timeline import MemoryTimeline, live_tensor_bytes, memory_reader
from minilib.operations.metrics.trend import MOST_POINTS, robust_slope, trend_significance

MIB = 2**20


@pytest.fixture
def few_objects():
    """The objects of all modules are set aside, so that a walk over objects is short."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def timeline_of(held):
    """One that saw these bytes at the ends of steps."""
    values = iter(held)
    timeline = MemoryTimeline(lambda: {"resident": next(values)})
    for _ in held:
        timeline.step_ended()
    return timeline


# (row, slope, significance) by scipy 1.17.1: theilslopes, and kendalltau (asymptotic) with one pair less of the
# difference, the correction for continuity that scipy leaves out.
BY_SCIPY = [
    ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], 0.4444444444444444, 2.7033813413374985),
    ([0, 0, 0, 1, 1, 2, 0, 5, 5, 7, 7, 7], 0.7638888888888888, 3.4083436919842867),
    ([9, 8, 9, 7, 4, 4, 5, 1, 0, 0], -1.0, -3.168751111488148),
]


@pytest.mark.parametrize(("row", "slope", "significance"), BY_SCIPY)
def test_slope_and_trend_are_those_of_scipy(row, slope, significance):
    assert robust_slope(range(len(row)), row) == pytest.approx(slope)
    assert trend_significance(range(len(row)), row) == pytest.approx(significance)


def test_outliers_do_not_move_the_slope():
    y = [3.0 * x for x in range(100)]
    y[10], y[50], y[90] = 1e9, -1e9, 1e9
    assert robust_slope(range(100), y) == pytest.approx(3)


@pytest.mark.parametrize("row", [[], [5], [5, 5], [7] * 50])
def test_nothing_grows_where_nothing_changes(row):
    assert robust_slope(range(len(row)), row) == 0 and trend_significance(range(len(row)), row) == 0


def test_a_long_row_is_thinned_and_keeps_its_slope():
    count = 50 * MOST_POINTS
    assert robust_slope(range(count), np.arange(count) * 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_trend_needs_finite_numbers_and_rows_of_one_length(bad):
    with pytest.raises(ValueError, match="finite"):
        robust_slope([0, 1], [0, bad])
    with pytest.raises(ValueError, match="2 and 1"):
        trend_significance([0, 1], [0])


# A timeline


def test_a_leak_is_found_in_noise_a_hundred_times_larger_than_one_step_of_it():
    noise = np.random.default_rng(0).normal(0, MIB, 400)
    growth = timeline_of([int(500 * MIB + step * MIB / 100 + noise[step]) for step in range(400)]).growth("resident")
    assert growth.grows and growth.bytes_per_step == pytest.approx(MIB / 100, rel=0.3)


@pytest.mark.parametrize(
    "held",
    [
        [100 * MIB] * 40,
        [(100 + 50 * (step > 5)) * MIB for step in range(40)],  # the optimizer makes its state
        [(100 + min(step, 18)) * MIB for step in range(40)],  # an allocator warms up
        [(100 + step % 7) * MIB for step in range(40)],  # a cache that fills and is emptied
        [(200 - step) * MIB for step in range(40)],
        [100 * MIB + step for step in range(15)],  # too few to tell
    ],
    ids=["constant", "jump", "warm-up", "sawtooth", "shrinks", "too few steps"],
)
def test_what_does_not_go_on_is_no_growth(held):
    assert not timeline_of(held).growth("resident").grows


def test_no_false_alarm_in_three_hundred_noisy_rows():
    alarms = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(0, MIB, 40)
        alarms += timeline_of([int(100 * MIB + each) for each in noise]).growth("resident").grows
    assert alarms == 0


def test_a_floor_says_what_is_too_little_to_tell_of():
    timeline = timeline_of([step * 1000 for step in range(30)])
    assert timeline.growth("resident", floor=999).grows and not timeline.growth("resident", floor=1001).grows


@pytest.mark.parametrize("leaky", [None, "data", "forward"])
def test_tensors_kept_by_a_phase_are_counted_to_the_byte(leaky, few_objects):
    """A list of losses with their graphs, the most common leak of training."""
    kept, timeline = [], MemoryTimeline(memory_reader(tensors=True))
    for _ in range(16):
        for name in ("data", "forward", "optimizer"):
            with timeline.phase(name):
                if name == leaky:
                    kept.append(torch.zeros(1000))
        timeline.step_ended()
    assert timeline.growth("tensors").grows is (leaky is not None)
    assert timeline.growth("tensors").bytes_per_step == 4000 * (leaky is not None)
    assert timeline.kept_by_phase("tensors") == {
        name: 4000 * (name == leaky) for name in ("data", "forward", "optimizer")
    }
    steps, held = timeline.series("tensors", "forward")
    assert steps == list(range(16)) and held[0] <= held[-1]


def test_views_share_a_storage_that_counts_once(few_objects):
    before = live_tensor_bytes()
    whole = torch.zeros(10, 100)
    views = [whole[0], whole.t(), whole.reshape(-1)]
    assert live_tensor_bytes() - before == 4000 and len(views) == 3


def test_a_phase_that_fails_is_sampled_all_the_same():
    timeline = MemoryTimeline(lambda: {"resident": 1})
    with pytest.raises(RuntimeError), timeline.phase("data"):
        raise RuntimeError
    assert [each.moment for each in timeline.samples] == ["begin", "end"]


def test_samples_are_bounded_and_wrong_calls_explained():
    timeline = MemoryTimeline(lambda: {"resident": 1}, capacity=3)
    with pytest.raises(ValueError, match="none yet"):
        timeline.growth("resident")
    for _ in range(10):
        timeline.step_ended()
    assert [each.step for each in timeline.samples] == [7, 8, 9]
    with pytest.raises(ValueError, match="sampled here: resident; got 'tensors'"):
        timeline.growth("tensors")
    with pytest.raises(ValueError, match="capacity"):
        MemoryTimeline(lambda: {}, capacity=0)
