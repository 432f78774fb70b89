"""A clock that jumps: sleeps end exactly when they are due and in their order, timeouts hold, and nothing hangs."""

import asyncio
import time

import pytest

from minilib.classic.http.experiment import run_in_thread
from minilib.classic.observed_service.virtual_time import NothingWillHappen, VirtualTimeLoop


def run(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


def test_an_hour_of_sleep_takes_no_time_and_ends_on_time():
    async def main():
        clock, ended = asyncio.get_running_loop().time, []

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            ended.append((seconds, clock()))

        await asyncio.gather(*map(sleeper, (3600, 0.5, 0, 2)))
        return ended

    begun = time.process_time()
    assert run(main) == [(0, 0), (0.5, 0.5), (2, 2), (3600, 3600)]
    assert time.process_time() - begun < 60


def test_a_timeout_is_kept_to_the_moment():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(5.001)
        assert asyncio.get_running_loop().time() == 5
        async with asyncio.timeout(5):
            await asyncio.sleep(4.999)
        return asyncio.get_running_loop().time()

    assert run(main) == pytest.approx(9.999)


def test_who_waits_for_ever_is_told_so():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(NothingWillHappen, match="no timer and no other task"):
        run(main)


def test_it_runs_beside_a_running_loop_as_in_a_notebook():
    async def main():
        return run_in_thread(lambda: asyncio.sleep(30, "slept"), VirtualTimeLoop)

    assert asyncio.run(main()) == "slept"
    with pytest.raises(TimeoutError):
        run_in_thread(lambda: asyncio.sleep(61), VirtualTimeLoop)
