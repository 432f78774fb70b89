"""Crashes of an engine's process, wherever they come: told by name, started again, and the same tokens after it."""

import asyncio
import os
import signal
from functools import partial

import pytest

from minilib.serving.asynchronous.errors import EngineDied, EngineNotReady, EngineStopped
from minilib.serving.request import SamplingParams
from minilib.serving.server.supervision import Crashes, Supervision
from tests.serving.server.engines import (
    EXIT,
    HANG,
    KINDS,
    QUICK,
    RAISE,
    assert_idle,
    breakable_engine,
    outputs,
    ready,
    remote_engine,
    run,
    until,
)

LONG = SamplingParams(50, temperature=0)


def kill(remote):
    os.kill(remote._process.pid, signal.SIGKILL)


async def before_it_is_taken(remote):
    os.kill(remote._process.pid, signal.SIGSTOP)
    submitted = asyncio.create_task(remote.submit((9, 10), LONG))
    await until(lambda: remote.num_waiting)
    kill(remote)
    await submitted


async def in_the_prompt(remote):
    """A prompt of 30 tokens takes six steps."""
    stream, steps = await remote.submit(tuple(range(8, 21)) * 2, LONG), remote.status().steps
    await until(lambda: remote.status().steps > steps)
    kill(remote)
    await stream.get_many()
    await stream.get_many()


async def in_an_answer(remote):
    stream = await remote.submit((9, 10), LONG)
    await anext(stream)
    kill(remote)
    while True:
        assert await stream.get_many()


async def by_an_exit(remote):
    await outputs(remote, (9, EXIT), LONG)


async def by_an_error(remote):
    await outputs(remote, (9, RAISE), LONG)


CRASHES = {
    before_it_is_taken: "killed by SIGKILL",
    in_the_prompt: "killed by SIGKILL",
    in_an_answer: "killed by SIGKILL, as the system does when memory runs out",
    by_an_exit: "exit code 3",
    by_an_error: "ArithmeticError: the scheduler broke",
}


def test_every_open_stream_is_told_and_the_engine_starts_again():
    async def main():
        async with remote_engine(partial(breakable_engine, max_batch_tokens=5)) as far:
            expected = await asyncio.gather(*(outputs(far, *kind) for kind in KINDS))
            counted = far.status()
            for number, (crash, cause) in enumerate(CRASHES.items()):
                other = await far.submit((11, 12), LONG)
                with pytest.raises(EngineDied, match=f"process died: .*{cause}.*; send the request") as death:
                    await crash(far)
                with pytest.raises(EngineDied, match=cause):
                    while await other.get_many():
                        pass
                assert ("in raising" in str(death.value.__cause__)) == (crash is by_an_error)
                told = far.status()
                assert (told.state, told.restarts) == ("restarting", number + 1)
                assert (told.num_running, told.num_waiting) == (0, 0)
                with pytest.raises(EngineNotReady, match="crashed and is being started again") as refusal:
                    await far.submit((9, 10), LONG)
                assert refusal.value.retry_after > 0
                await ready(far)
                assert await asyncio.gather(*(outputs(far, *kind) for kind in KINDS)) == expected
                await assert_idle(far)
                before, counted = counted, far.status()
                grown = ("prompt_tokens", "generated_tokens", "steps")
                assert all(getattr(counted, name) > getattr(before, name) for name in grown)

    run(main())


def test_a_crash_while_it_drains_ends_it():
    async def main():
        async with remote_engine() as far:
            stream = await far.submit((9, 10), LONG)
            draining = asyncio.create_task(far.drain())
            await until(lambda: far.status().state == "draining")
            kill(far)
            await draining
            assert (far.status().state, far.status().restarts) == ("stopped", 0)
            with pytest.raises(EngineDied, match="SIGKILL"):
                while await stream.get_many():
                    pass

    run(main())


def test_a_step_that_never_ends_is_ended_and_shown():
    async def main():
        limits = Supervision(first_pause=0, step_timeout=1.0, most_crashes=2)
        async with remote_engine(supervision=limits) as far:
            with pytest.raises(EngineDied, match="it made no step for 1 s") as death:
                await outputs(far, (9, HANG), LONG)
            assert "in breaking" in str(death.value.__cause__), "where it hung"
            await ready(far)
            with pytest.raises(EngineDied, match="exit code 3"):
                await outputs(far, (9, EXIT), LONG)
            await until(lambda: far.status().state == "stopped")
            with pytest.raises(EngineStopped, match="has stopped: it ended with exit code 3") as refusal:
                await far.submit((9,))
            assert not isinstance(refusal.value, EngineNotReady)
            assert far.status().restarts == 1

    run(main())


def test_pauses_grow_and_come_to_an_end():
    crashes = Crashes(Supervision(first_pause=1, longest_pause=3, most_crashes=4, window=100))
    assert [crashes.pause(now) for now in (0, 10, 20, 30)] == [1, 2, 3, None]
    assert crashes.pause(110.5) == 3, "the first two are forgotten"
    assert crashes.pause(500) == 1
    assert QUICK.most_crashes == 100


@pytest.mark.parametrize(
    "wrong",
    [{"step_timeout": 0}, {"start_timeout": -1}, {"window": float("nan")}, {"most_crashes": 0}, {"first_pause": 31}],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Supervision(**wrong)
