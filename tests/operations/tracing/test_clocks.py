"""Clocks of ranks on that of rank 0: offsets and drift that the test makes are found within the bound that is told."""

import random
import time

import pytest

from minilib.operations.tracing.clocks import (
    ClockLine,
    ClockOffset,
    TimestampExchange,
    exchange_clocks,
    offset_of,
)
from minilib.ranks.launch import run

SECOND = 10**9


def exchanges(chance, true_offset, rounds, begin=0, drift=0.0):
    """Exchanges over a network whose ways there and back differ, and which is slow now and then."""
    found, now = [], begin
    for _ in range(rounds):
        there, back = (chance.randrange(5_000, 50_000) * (20 if chance.random() < 0.3 else 1) for _ in range(2))

        def reference(clock):
            return clock + true_offset + round(drift * clock)

        answered = now + there + 700
        found.append(TimestampExchange(now, reference(now + there), reference(answered), answered + back))
        now += there + back + 10_000
    return found


@pytest.mark.parametrize("offset", [-SECOND, -123_456_789, -1, 0, 1, 42_000, SECOND])
def test_the_offset_lies_within_its_bound(offset):
    for seed in range(50):
        found = offset_of(exchanges(random.Random(seed), offset, rounds=20))
        assert abs(found.offset_ns - offset) <= found.bound_ns < 100_000


def test_the_bound_is_reached_by_a_way_of_one_direction():
    """All of the round trip on the way there: no method can know, and the bound says so."""
    found = offset_of([TimestampExchange(0, 10_000, 10_000, 10_000)])
    assert found.offset_ns == 5_000 and 5_000 <= found.bound_ns <= 5_002


@pytest.mark.parametrize("offset", [-SECOND, 0, SECOND])
@pytest.mark.parametrize("drift", [-2e-4, -1e-6, 0, 5e-5, 2e-4])
def test_a_line_follows_a_clock_that_drifts(offset, drift):
    for seed in range(20):
        chance, last = random.Random(seed), 600 * SECOND
        ends = [offset_of(exchanges(chance, offset, 20, begin, drift)) for begin in (0, last)]
        line = ClockLine(*ends)
        for clock in (0, 1, last // 3, last // 2, last, 2 * last):
            truth = clock + offset + round(drift * clock)
            assert abs(line.to_reference(clock) - truth) <= line.bound_ns(clock)
        assert line.bound_ns(last // 2) <= max(end.bound_ns for end in ends) * 1.001 + 1
        one = ClockLine(ends[0], ends[0])
        assert drift < 1e-4 or abs(one.to_reference(last) - last - offset - drift * last) > one.bound_ns(last)


def test_a_line_never_goes_back():
    line = ClockLine(ClockOffset(0, 10, 5), ClockOffset(1000, -190, 5))
    found = [line.to_reference(clock) for clock in range(-50, 2000)]
    assert found == sorted(found)


def test_ranks_find_offsets_that_were_put_into_their_clocks():
    """The ranks of one machine share a clock, so the offset between what they add to it is the truth."""

    def on_rank():
        import torch.distributed as dist

        rank = dist.get_rank()
        added, drift, start = (0, SECOND, -SECOND, 777)[rank], (0, 1e-4, -1e-4, 0)[rank], time.monotonic_ns()

        def moved(now):
            return now + added + round(drift * (now - start))

        first = exchange_clocks(clock=lambda: moved(time.monotonic_ns()))
        middle = time.monotonic_ns()
        line = ClockLine(first, exchange_clocks(clock=lambda: moved(time.monotonic_ns())))
        clock = moved(middle)
        return line.to_reference(clock) - middle, line.bound_ns(clock), first.offset_ns

    found = run(on_rank, 4, timeout=60)
    for (error, bound, offset), added in zip(found, (0, SECOND, -SECOND, 777), strict=True):
        assert abs(error) <= bound, (error, bound)
        assert abs(offset + added) < 1_000_000 + bound  # the drift since the start is little
    assert found[0] == (0, 1, 0)


def test_refusals():
    with pytest.raises(ValueError, match="at least one exchange"):
        offset_of([])
    with pytest.raises(ValueError, match="never goes back"):
        TimestampExchange(10, 0, 0, 9)
    with pytest.raises(ValueError, match="later than the first"):
        ClockLine(ClockOffset(5, 0, 0), ClockOffset(4, 0, 0))
    with pytest.raises(ValueError, match="rounds"):
        exchange_clocks(rounds=0)


@pytest.mark.parametrize("there", range(4))
@pytest.mark.parametrize("back", range(4))
def test_the_bound_holds_to_the_nanosecond(there, back):
    """Both ends of what the four times allow: all of the way was there, or all of it back."""
    for sent in (10, 11):
        exchange = TimestampExchange(sent, sent + there, sent + there, sent + there + back)
        found = offset_of([exchange])
        for true in (exchange.received - exchange.sent, exchange.answered - exchange.returned):
            assert abs(true - found.offset_ns) <= found.bound_ns <= (there + back) / 2 + 2
