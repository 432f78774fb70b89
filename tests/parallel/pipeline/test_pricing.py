"""Prices: closed forms, published tables, and uneven stages."""

import itertools

import pytest

from minilib.parallel.pipeline.checking import UnsoundSchedule
from minilib.parallel.pipeline.pricing import StageTimes, expected_bubble, most_activations, price_schedule
from minilib.parallel.pipeline.schedule import PipelineSchedule
from minilib.parallel.pipeline.schedules import SCHEDULES

EQUAL = StageTimes()
NAN, INF = float("nan"), float("inf")


def idle(schedule, times):
    """Most time that a rank waits between its first and its last action."""
    price = price_schedule(schedule, times)
    per_rank = schedule.num_stages // schedule.num_ranks
    return price.longest_rank - schedule.num_microbatches * per_rank * (times.of("F") + times.of("B"))


@pytest.mark.parametrize("times", [EQUAL, StageTimes(2, 2, 1), StageTimes(2, 3, 1), StageTimes(2, 1, 2)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "breadth-first", "interleaved", "zero-bubble"])
def test_the_bubble_in_closed_form(name, times):
    for ranks, rounds in itertools.product((1, 2, 4, 8), (1, 2, 3)):
        schedule = SCHEDULES[name](ranks, ranks * rounds)
        assert idle(schedule, times) == pytest.approx(expected_bubble(schedule, times)), (ranks, rounds)


def test_the_bubble_of_one_forward_one_backward_is_that_of_any_pipeline():
    for name, ranks, microbatches in itertools.product(("gpipe", "1f1b"), (1, 2, 4), (4, 7, 16)):
        price = price_schedule(SCHEDULES[name](ranks, microbatches), StageTimes(2, 3, 1))
        assert price.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_published_table_of_zero_bubble(ranks):
    """At F = I = W, as parts of 1F1B's bubble: ZB-H1 a third, ZBV none; activations as of 1F1B, also in a V."""
    base = idle(SCHEDULES["1f1b"](ranks, 2 * ranks), EQUAL)
    assert idle(SCHEDULES["zero-bubble"](ranks, 2 * ranks), EQUAL) == pytest.approx(base / 3)
    assert idle(SCHEDULES["zbv"](ranks, 2 * ranks), EQUAL) == 0
    assert idle(SCHEDULES["zbv"](ranks, 2 * ranks), StageTimes(2, 3, 1)) > 0, "only where F = I = W"
    whole = {name: max(price_schedule(SCHEDULES[name](ranks, 2 * ranks), EQUAL).activations) for name in SCHEDULES}
    assert whole["1f1b"] == whole["zero-bubble"] == ranks and whole["gpipe"] == 2 * ranks
    assert whole["zbv"] == 2 * ranks and whole["dual-pipe-v"] == 2 * ranks + 1, "of stages half as large"


def test_interleaving_shrinks_the_bubble():
    """The model cut in v times as many stages: each takes 1/v of the time."""
    seconds = [
        price_schedule(SCHEDULES["interleaved"](4, 8, v), StageTimes(6 / v, 6 / v, 6 / v)).seconds for v in (2, 3, 6)
    ]
    assert seconds == pytest.approx([8 * 18 + 3 * 18 / v for v in (2, 3, 6)])


def test_activations_do_not_grow_with_microbatches():
    for name in SCHEDULES:
        few, many = (price_schedule(SCHEDULES[name](4, m), EQUAL).activations for m in (8, 32))
        assert (few == many) == (name not in ("gpipe", "breadth-first")), name
    price = price_schedule(SCHEDULES["1f1b"](4, 32), EQUAL)
    assert price.activations == (4, 3, 2, 1)
    assert most_activations(()) == 0


def test_the_slowest_stage_sets_the_pace_and_messages_take_time():
    times = [StageTimes(1, 1, 1), StageTimes(1, 1, 1), StageTimes(2, 2, 2), StageTimes(1, 1, 1)]
    price = price_schedule(SCHEDULES["gpipe"](4, 10), times)
    assert price.seconds == 5 + 9 * 2 + 10 + 9 * 4
    schedule = SCHEDULES["1f1b"](2, 4)
    slow, free = (price_schedule(schedule, EQUAL, transfer) for transfer in (0.5, 0))
    assert slow.seconds > free.seconds and slow.timeline.busy(0) == free.timeline.busy(0)
    nobody = price_schedule(PipelineSchedule.read("mine", "0F0 0B0\n", [0]), EQUAL)
    assert (nobody.longest_rank, nobody.activations, nobody.bubble) == (3, (1, 0), 0.5), "a rank without a stage"
    alone = price_schedule(SCHEDULES["gpipe"](1, 3), EQUAL, transfer=7)
    assert (alone.seconds, alone.bubble) == (9, 0)


def test_what_cannot_be_priced():
    schedule = SCHEDULES["1f1b"](2, 2)
    with pytest.raises(ValueError, match="needs times of 2 stages, or of one for all; got 3"):
        price_schedule(schedule, [EQUAL] * 3)
    with pytest.raises(TypeError, match="the times of a stage are StageTimes, got 1"):
        price_schedule(schedule, [1, 1])
    for name, bad in itertools.product(("forward", "input_gradient", "weight_gradient"), (-1, NAN, INF)):
        with pytest.raises(ValueError, match=f"{name} takes a time of 0 or more, got {bad}; it has to be finite"):
            price_schedule(schedule, StageTimes(**{name: bad}))
    for bad in (-1, NAN, INF):
        with pytest.raises(ValueError, match=f"transfer is a time, 0 or more, got {bad}"):
            price_schedule(schedule, EQUAL, bad)
    with pytest.raises(UnsoundSchedule):
        price_schedule(PipelineSchedule("mine", 1, (0,), ((),)), EQUAL)
    with pytest.raises(ValueError, match="no closed form here for zbv with 2 stages a rank"):
        expected_bubble(SCHEDULES["zbv"](2, 4), EQUAL)


def test_the_closed_form_is_right_or_refused():
    """Weight gradients that are too long to hide, too few microbatches, and rounds that are longer than the ranks."""
    answered = refused = 0
    for name, ranks, microbatches in itertools.product(SCHEDULES, (1, 2, 4), range(1, 11)):
        for times in (EQUAL, StageTimes(3, 0, 2), StageTimes(1, 3, 2), StageTimes(1, 1, 3), StageTimes(0, 0, 0)):
            try:
                schedule = SCHEDULES[name](ranks, microbatches)
                expected = expected_bubble(schedule, times)
            except ValueError:
                refused += 1
                continue
            answered += 1
            assert idle(schedule, times) == pytest.approx(expected), (name, ranks, microbatches, times)
    assert answered > 300 and refused > 300
    with pytest.raises(ValueError, match="no closed form here for zero-bubble with 1 .*weight_gradient=3"):
        expected_bubble(SCHEDULES["zero-bubble"](4, 8), StageTimes(1, 1, 3))
