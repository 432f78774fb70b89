"""Requests arrive when they are due, whatever the server does, and their latency counts from there."""

import asyncio

import pytest

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.load.arrivals import Arrival, random_arrivals
from minilib.serving.load.clock import VirtualClock, WallClock
from minilib.serving.load.metrics import ServingMetrics
from minilib.serving.load.open_loop import offer, run_open_loop
from minilib.serving.load.simulation import SimulatedEngine
from tests.serving import faults
from tests.serving.asynchronous.test_async_engine import run
from tests.serving.asynchronous.test_fault_isolation import breaking, ran
from tests.serving.served import assert_idle, likeliest


def simulated(price, clock, **options):
    return SimulatedEngine(faults.CONFIG, price, clock, 200, page_size=4, **options)


def load(dues, prompts, news):
    return random_arrivals(dues, prompts, news, faults.CONFIG.vocab_size)


def test_a_load_in_numbers():
    """Steps of 1 s; the second request comes in the middle of one, and the third when all is quiet again."""
    clock = VirtualClock()
    engine = simulated(lambda counts: 1.0, clock)
    first, second, third = run_open_loop(engine, load([0.0, 0.5, 9.25], [3, 4, 2], [3, 2, 1]), clock)
    assert (first.due, first.token_times, first.ended) == (0.0, (1.0, 2.0, 3.0), 3.0)
    assert (second.due, second.token_times) == (0.5, (2.0, 3.0)) and second.ttft == 1.5
    assert (third.due, third.token_times) == (9.25, (10.25,))
    assert [step.started for step in engine.history] == [0.0, 1.0, 2.0, 9.25]
    assert_idle(engine)


def test_no_omission_is_coordinated():
    """The server stalls for 100 s in its third step; who was due meanwhile waits as long as that, and counts it.

    A generator that sends the next request after the answer to the last would have sent one request into the stall.
    """
    clock, steps = VirtualClock(), []
    engine = simulated(lambda counts: steps.append(counts) or (100.0 if len(steps) == 3 else 0.1), clock)
    times = run_open_loop(engine, load([float(n) for n in range(60)], [4] * 60, [1] * 60), clock)
    stalled = [one for one in times if one.due >= 2]
    assert [one.ttft for one in times[:2]] == pytest.approx([0.1, 0.1])
    assert [one.ttft for one in stalled] == pytest.approx([100.0] + [2 + 100 + 0.1 - one.due for one in stalled[1:]])
    assert ServingMetrics.of(times).ttft.p50 > 70


def test_requests_that_are_due_at_one_time_keep_their_order():
    clock = VirtualClock()
    times = run_open_loop(
        simulated(lambda counts: 1.0, clock, max_sequences=1), load([2.0] * 3, [3] * 3, [1] * 3), clock
    )
    assert [one.token_times for one in times] == [(3.0,), (4.0,), (5.0,)]


def test_the_order_of_the_load_does_not_matter():
    arrivals = load([3.0, 0.0, 1.0, 1.0], [3, 4, 5, 6], [2, 3, 4, 5])
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        clock = VirtualClock()
        times = run_open_loop(simulated(lambda counts: 0.25, clock), [arrivals[n] for n in order], clock)
        found.append({order[place]: one for place, one in enumerate(times)})
    assert found[0] == found[1]


def test_refused_requests_have_an_error_and_the_others_their_tokens():
    clock = VirtualClock()
    bad = Arrival(1.0, [1] * 64, likeliest(2))
    good, refused = run_open_loop(simulated(lambda counts: 1.0, clock), [*load([0.0], [3], [3]), bad], clock)
    assert good.completed and len(good.token_times) == 3
    assert "64 tokens, and the model takes at most 64" in refused.error and refused.token_times == ()
    assert (refused.due, refused.ended) == (1.0, 1.0)


def test_errors_in_the_middle_and_a_wall_clock():
    engine = faults.faulty_engine(40, 4)
    arrivals = [Arrival(0.0, (9, faults.NAN), likeliest(4)), Arrival(0.002, (9, 10), likeliest(4))]
    bad, good = run_open_loop(engine, arrivals, WallClock())
    assert "NaN" in bad.error and bad.token_times == () and good.completed and len(good.token_times) == 4
    assert good.ttft > 0 and good.token_times[0] >= 0.002


def test_nothing_arrives():
    clock = VirtualClock()
    assert run_open_loop(simulated(lambda counts: 1.0, clock), [], clock) == []


def test_a_step_that_raises_leaves_nothing_behind():
    clock = VirtualClock()
    engine = breaking(simulated(lambda counts: 1.0, clock), ran("1"))
    with pytest.raises(faults.Broken):
        run_open_loop(engine, load([0.0, 2.0, 9.0], [3, 3, 3], [5, 5, 5]), clock)
    assert_idle(engine)
    engine.add_request("a", [1], likeliest(1))
    with pytest.raises(ValueError, match="unfinished requests"):
        run_open_loop(engine, [], clock)


def test_virtual_time_passes_forwards_alone():
    clock = VirtualClock()
    clock.advance(0)
    clock.wait_until(3.0)
    clock.wait_until(1.0)
    assert clock.now() == 3.0
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="0 seconds or more"):
            clock.advance(wrong)


def test_a_client_of_the_engine_behind_asyncio_gets_the_same_tokens():
    arrivals = load([0.0, 0.003, 0.001, 0.02], [3, 9, 5, 2], [4, 6, 1, 3])

    async def main():
        async with AsyncEngine(faults.faulty_engine(80, 4)) as served:
            times = await offer(served, arrivals)
            served.check_invariants()
        assert_idle(served.engine)
        return times

    times = run(main())
    assert [one.due for one in times] == [0.0, 0.003, 0.001, 0.02]
    for one, arrival in zip(times, arrivals, strict=True):
        if one.completed:
            assert len(one.token_times) == arrival.params.max_tokens
            assert one.token_times[0] >= one.due and one.ended == one.token_times[-1]
    assert sum(one.completed for one in times) >= 1


def test_a_client_notes_what_was_refused_and_what_died():
    async def main():
        served = AsyncEngine(breaking(faults.faulty_engine(80, 4), ran("bad")), max_waiting=2)
        options = {"request_id": "bad"}
        full = [Arrival(0.0, (9, 10), likeliest(3)) for _ in range(5)]
        bad = Arrival(0.05, (9, 10), likeliest(3), options)
        times = await offer(served, [*full, bad])
        await served.shutdown()
        return times, await offer(served, full[:1])

    (*full, bad), (late,) = run(main())
    refused = [one for one in full if not one.completed]
    assert len(refused) == 3 and all("QueueFull: 2 requests wait" in one.error for one in refused)
    assert "Broken" in bad.error and "EngineStopped" in late.error


def test_the_client_is_cancelled_with_all_its_requests():
    async def main():
        async with AsyncEngine(faults.faulty_engine(80, 4)) as served:
            task = asyncio.create_task(offer(served, load([0.0] * 3 + [1e9], [3] * 4, [60] * 4)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            served.check_invariants()
            assert not served.engine.requests

    run(main())
