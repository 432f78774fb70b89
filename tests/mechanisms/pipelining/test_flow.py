"""Items through stages: closed forms where stages are steady, a recurrence where they are not, and bounded buffers."""

import itertools
import random

import pytest

from minilib.mechanisms.pipelining import (
    flow,
    flow_seconds,
    most_in_flight,
    timeline_of,
    waiting,
)

CAPACITIES = (None, 0, 1, 2, 5)


@pytest.mark.parametrize("times", [(1,), (3, 1), (1, 3), (1, 2, 1), (2, 1, 3, 2), (1, 1, 1, 1), (0, 2, 0)])
def test_fill_and_n_times_the_slowest(times):
    """Buffers of any size, also none, change nothing where every item takes the same time."""
    for num_items, capacity in itertools.product((0, 1, 2, 7), CAPACITIES):
        timeline = timeline_of(flow(num_items, len(times), capacity), lambda key: times[key[0]])
        assert timeline.makespan == flow_seconds(times, num_items)
        if num_items:
            assert timeline.workers[-1][0].start == sum(times[:-1])


@pytest.mark.parametrize(("num_stages", "num_items"), [(1, 1), (1, 5), (4, 1), (4, 4), (4, 12), (8, 8)])
def test_the_bubble_of_equal_stages(num_stages, num_items):
    timeline = timeline_of(flow(num_items, num_stages), lambda key: 2)
    assert timeline.bubble == pytest.approx((num_stages - 1) / (num_items + num_stages - 1))


def recurrence(times, capacity):
    """When each stage of a line with finite buffers begins each item, by the departures that queueing theory tracks.

    Stage s begins item i when the item is there and item i - 1 has left. Item i leaves when it is done, and when item
    i - 1 - capacity has left the next stage, so that buffer and stage have a place.
    """
    stages, items = len(times), len(times[0])
    left = [[0] * items for _ in range(stages + 1)]  # left[s + 1][i]: from stage s
    begun = [[0] * items for _ in range(stages)]
    for i in range(items):
        for s in range(stages):
            here = left[s][i] if s else 0
            begun[s][i] = max(here, left[s + 1][i - 1] if i else 0)
            done = begun[s][i] + times[s][i]
            if s + 1 < stages and capacity is not None and i - 1 - capacity >= 0:
                done = max(done, left[s + 2][i - 1 - capacity])
            left[s + 1][i] = done
    return begun


@pytest.mark.parametrize("seed", range(20))
def test_items_of_different_times_against_the_recurrence_of_a_line_with_finite_buffers(seed):
    draw = random.Random(seed)
    stages, items = draw.randint(1, 4), draw.randint(1, 9)
    times = [[draw.randint(0, 6) for _ in range(items)] for _ in range(stages)]
    for capacity in CAPACITIES:
        timeline = timeline_of(flow(items, stages, capacity), lambda key: times[key[0]][key[1]])
        begun = recurrence(times, capacity)
        assert [[span.start for span in spans] for spans in timeline.workers] == begun


def test_a_slow_last_stage_fills_every_buffer_and_every_hand():
    for capacity, num_stages in itertools.product((0, 1, 3), (1, 2, 4)):
        plan = flow(40, num_stages, capacity)
        timeline = timeline_of(plan, lambda key, last=num_stages - 1: 9 if key[0] == last else 1)
        assert most_in_flight(timeline) == num_stages + capacity * (num_stages - 1)
    unbounded = timeline_of(flow(40, 2), lambda key: 9 if key[0] else 1)
    assert most_in_flight(unbounded) == 36, "40 have begun by time 40, when 4 are done"


def test_a_slow_first_stage_fills_nothing():
    timeline = timeline_of(flow(40, 3, 5), lambda key: 1 if key[0] else 9)
    assert most_in_flight(timeline) == 2


@pytest.mark.parametrize("bad", [(-1, 1, None), (1, 0, None), (1, 1, -1)])
def test_numbers_that_are_too_small(bad):
    with pytest.raises(ValueError, match="needs num_items ≥ 0, num_stages ≥ 1, capacity ≥ 0"):
        flow(*bad)


def test_waiting_is_all_the_time_that_is_not_work():
    """Until a stage's last item has left; in front of the slowest stage blocked, behind it starved."""
    for capacity in (0, 1, 3):
        timeline = timeline_of(flow(9, 3, capacity), lambda key: (1, 4, 2)[key[0]])
        first, slowest, last = waiting(timeline, capacity)
        assert first == (0, timeline.workers[1][8 - capacity].start - 9) and first.blocked > 0
        assert slowest == (1, 0) and last == (timeline.makespan - 9 * 2, 0)
    assert waiting(timeline_of(flow(0, 2), lambda key: 1)) == [(0, 0), (0, 0)]


def test_formulas_without_stages_or_items():
    assert flow_seconds((1, 2), 0) == 0
    assert most_in_flight(timeline_of([], lambda key: 1)) == most_in_flight(timeline_of(flow(0, 3), lambda key: 1)) == 0
    for times, num_items in (((), 3), ((), 0), ((1, 2), -1)):
        with pytest.raises(ValueError, match="needs the time of 1 stage or more, and num_items ≥ 0; got"):
            flow_seconds(times, num_items)
