"""RED and USE: two laws that hold to the last digit in simulated time, holders that are named, and waits that end."""

import asyncio
import random

import pytest

from minilib.classic.observed_service.metrics import Red, Resource
from minilib.classic.observed_service.tracer import Tracer
from minilib.classic.observed_service.virtual_time import VirtualTimeLoop


def run(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_utilisation_and_saturation_obey_littles_law(capacity):
    """λ · S / c and λ · W, from what each task saw itself."""

    async def main():
        clock, rng, spans = asyncio.get_running_loop().time, random.Random(capacity), []
        resource = Resource("disk", capacity, Tracer("p", spans, rng))
        waits, holds = [], []

        async def task(arrival, service):
            await asyncio.sleep(arrival)
            came = clock()
            with Tracer("p", spans, rng).span("task"):
                async with resource.hold():
                    waits.append(clock() - came)
                    await asyncio.sleep(service)
                    holds.append(service)
            resource.check_invariants()

        await asyncio.gather(*(task(rng.uniform(0, 10), rng.expovariate(20 / capacity)) for _ in range(150)))
        used, seconds = resource.use(), clock()
        assert used.utilisation == pytest.approx(sum(holds) / capacity / seconds, rel=1e-9)
        assert used.saturation == pytest.approx(sum(waits) / seconds, rel=1e-6)
        assert used.saturation > 0.01 and used.errors == 0 and resource.acquired == 150
        waited_ns = sum(span.duration_ns for span in spans if span.name == "wait for disk")
        assert waited_ns == pytest.approx(sum(waits) * 1e9, rel=1e-6), "each wait is a span"

    run(main)


def test_who_waits_knows_the_trace_that_holds():
    async def main():
        spans, rng = [], random.Random(0)
        tracer = Tracer("p", spans, rng)
        lock = Resource("lock", 1, tracer)

        async def task(name, delay):
            await asyncio.sleep(delay)
            with tracer.span(name):
                async with lock.hold():
                    await asyncio.sleep(1)

        await asyncio.gather(task("holder", 0), task("waiter", 0.5))
        by_name = {span.name: span for span in spans}
        assert by_name["wait for lock"].attributes["holder"] == by_name["holder"].trace_id
        assert by_name["wait for lock"].trace_id == by_name["waiter"].trace_id
        assert by_name["wait for lock"].duration_ns == 500_000_000

    run(main)


def test_who_gives_up_is_an_error_and_leaves_the_queue():
    async def main():
        lock = Resource("lock", 1, Tracer("p", [], random.Random(0)))
        async with lock.hold():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1), lock.hold():
                    raise AssertionError("nobody has given it back")
            assert (lock.held, lock.waiting) == (1, 0)
        async with lock.hold():
            lock.check_invariants()
        assert lock.use().errors == 1 and lock.use().saturation == 1 and lock.use().utilisation == 1

    run(main)


def test_a_block_that_fails_gives_back_and_a_capacity_of_none_is_refused():
    async def main():
        tracer = Tracer("p", [], random.Random(0))
        lock = Resource("lock", 1, tracer)
        with pytest.raises(ZeroDivisionError):
            async with lock.hold():
                raise ZeroDivisionError
        async with lock.hold():
            assert lock.held == 1
        with pytest.raises(ValueError, match="one holder or more, got 0"):
            Resource("lock", 0, tracer)

    run(main)


def test_red_of_a_service_is_that_of_all_requests_of_its_instances():
    one, two = Red(), Red()
    for duration in range(1, 100):
        one.add(duration, failed=False)
    two.add(10_000, failed=True)
    merged = Red.merged([one, two])
    assert (merged.errors, merged.rate(seconds=10), merged.durations.maximum) == (1, 10, 10_000)
    assert merged.durations.quantile(0.5) == pytest.approx(50, rel=merged.durations.error)
