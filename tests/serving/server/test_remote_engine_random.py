"""Requests that come, leave and lose their process in random order: each gets its tokens, or the reason why not."""

import asyncio
import os
import random
import signal
from collections import Counter
from functools import partial

import pytest

from minilib.serving.asynchronous.errors import EngineDied, EngineNotReady, QueueFull
from minilib.serving.request import SamplingParams
from tests.serving.server.engines import assert_idle, breakable_engine, outputs, ready, remote_engine, run, until

CRASHES = 3
REQUESTS, LATE = 60, 5  # around a crash, and after it
MOST_WAITING = 6


def kinds():
    choices = random.Random(17)
    return [
        (
            tuple(choices.randrange(8, 33) for _ in range(choices.randint(1, 9))),
            SamplingParams(
                choices.randint(1, 25),
                temperature=choices.choice([0, 1.0]),
                seed=number,
                n=choices.choice([1, 1, 3]),
                logprobs=choices.choice([None, 2]),
            ),
        )
        for number in range(10)
    ]


def by_sample(made):
    found = {}
    for output in made:
        found.setdefault(output[0], []).append(output[:4])
    return found


@pytest.mark.parametrize("seed", range(8 if os.environ.get("INFRA_LONG") == "1" else 1))
def test_each_request_gets_its_own_tokens(seed):
    choices, done = random.Random(seed), Counter()

    async def main():
        async with remote_engine(partial(breakable_engine, max_sequences=4), max_waiting=MOST_WAITING) as far:
            expected = [by_sample(await outputs(far, *kind)) for kind in kinds()]

            async def client(kind):
                await asyncio.sleep(choices.choice([0, choices.random() * 0.3]))
                received, stays = [], choices.choice([0, 1, 3, 100, 100, 100])
                try:
                    stream = await far.submit(*kinds()[kind])
                    while (made := await stream.get_many()) and len(received) < stays:
                        received += [output[1:] for output in made]
                    how = "left" if made else "ended"
                    stream.close()
                except (EngineDied, EngineNotReady, QueueFull) as error:
                    how = type(error).__name__
                assert how != "ended" or by_sample(received) == expected[kind]
                for sample, own in by_sample(received).items():
                    assert own == expected[kind][sample][: len(own)]
                done[how] += 1

            for crash in range(CRASHES + 1):
                clients = [asyncio.create_task(client(choices.randrange(10))) for _ in range(REQUESTS)]
                await asyncio.sleep(choices.random() * 0.2)
                if crash < CRASHES:
                    os.kill(far._process.pid, signal.SIGKILL)
                    await until(lambda: far.status().state == "restarting")
                    clients += [asyncio.create_task(client(choices.randrange(10))) for _ in range(LATE)]
                await asyncio.gather(*clients)
                await ready(far)
                await assert_idle(far)
            assert far.status().restarts == CRASHES

    run(main())
    assert done.total() == (CRASHES + 1) * REQUESTS + CRASHES * LATE
    assert done.keys() == {"left", "ended", "EngineDied", "EngineNotReady", "QueueFull"}, "it was not random enough"
