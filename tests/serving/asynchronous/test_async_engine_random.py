"""Any order of submitting, leaving, failing steps and the end: each request gets what it gets alone, or its beginning.

4,000 operations in an ordinary run; with INFRA_LONG=1 in the environment 30 times as many.
"""

import asyncio
import os
import random
from collections import Counter

import pytest

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.asynchronous.errors import EngineStopped, QueueFull, RequestAborted
from minilib.serving.engine import Engine
from tests.serving.asynchronous.test_async_engine import run, until
from tests.serving.faults import Broken
from tests.serving.random_operations import Outcome
from tests.serving.served import Results, assert_idle
from tests.serving.test_engine_random import LONGEST, PREEMPTIONS, expected, model, requests

OPERATIONS = 500 * (30 if os.environ.get("INFRA_LONG") == "1" else 1)  # in one run
RUNS = [(page_size, preemption, end) for page_size in (2, 16) for preemption in ("recompute", "swap") for end in (0, 1)]
SHARES = {"submit": 40, "leave": 14, "fail": 8, "wait": 30, "check": 8}
MOST_LISTENERS = 12
BAD = "bad"  # in the names of requests that make each of their steps raise


class Clients:
    """Tasks that listen to requests of one engine, some of which leave early.

    Attributes:
        done: how often each operation and each outcome occurred.
    """

    def __init__(self, served, choices):
        self.served, self.choices, self.done = served, choices, Counter()
        self.tasks, self.listening, self.left = [], {}, set()
        self.kinds, self.results, self.errors = {}, Results(), {}
        self._failures = self._steps = 0
        forward = served.engine._forward

        def failing(work, interrupts):
            self._steps += 1
            if self._failures or any(BAD in sequence.request_id for sequence, _ in work):
                self._failures = max(0, self._failures - 1)
                self.done["failed step"] += 1
                raise Broken("no such row")
            return forward(work, interrupts)

        served.engine._forward = failing

    async def operate(self):
        name = self.choices.choices(list(SHARES), list(SHARES.values()))[0]
        self.done["operations"] += 1
        self.done[name] += 1
        if name == "submit" and len(self.listening) < MOST_LISTENERS:
            kind = self.choices.randrange(len(requests()))
            request_id = f"{len(self.kinds)} {self.choices.choice([BAD, *['good'] * 9])}"
            self.kinds[request_id] = kind
            self.listening[request_id] = asyncio.create_task(self._listen(request_id, kind))
            self.tasks.append(self.listening[request_id])
        elif name == "leave" and self.listening:
            request_id = self.choices.choice(list(self.listening))
            self.left.add(request_id)
            self.listening[request_id].cancel()
        elif name == "fail":
            self._failures = 1
        elif name == "check":
            self.served.check_invariants()
        else:
            await self._steps_made(self.choices.choice([0, 1, 4]))

    async def _steps_made(self, count):
        """Wait until the engine has made so many more steps, or has nothing to do."""
        enough = self._steps + count
        await asyncio.sleep(0)
        await until(lambda: self._steps >= enough or not (self.served.num_waiting or self.served.engine.has_unfinished))

    async def _listen(self, request_id, kind):
        try:
            async for output in await self.served.submit(*requests()[kind], request_id=request_id):
                self.results.take([output])
                if self.choices.random() < 0.01:
                    self.left.add(request_id)
                    return
        except (QueueFull, EngineStopped, RequestAborted) as error:
            self.errors[request_id] = type(error).__name__
        finally:
            self.listening.pop(request_id)

    def compare(self):
        """Hold what each request received against what it gets alone."""
        for request_id, kind in self.kinds.items():
            ended_early = request_id in self.left or request_id in self.errors
            for sample, alone in expected(kind).items():
                received = Outcome.of(self.results, request_id, sample)
                if ended_early or received.reason == "error":
                    assert received.tokens == alone.tokens[: len(received.tokens)]
                else:
                    assert received == alone and BAD not in request_id
                    self.done["whole"] += 1
                self.done[f"{BAD if BAD in request_id else 'good'} ended by {received.reason}"] += 1
        self.done.update(self.errors.values())


@pytest.mark.parametrize("page_size, preemption, end", RUNS)
def test_any_order_of_operations(page_size, preemption, end):
    choices = random.Random(f"{page_size}/{preemption}/{end}")
    engine = Engine(
        model(),
        -(-LONGEST // page_size) + choices.choice([0, 3]),
        page_size,
        PREEMPTIONS[preemption] // page_size + 1 if PREEMPTIONS[preemption] else 0,
        max_batch_tokens=choices.choice([5, 17]),
        max_sequences=choices.choice([3, 6]),
        preemption=preemption,
    )

    async def main():
        served = AsyncEngine(engine, max_waiting=6)
        clients = Clients(served, choices)
        for _ in range(OPERATIONS):
            await clients.operate()
        if end:
            await served.shutdown()
        else:
            await served.drain()
        served.check_invariants()
        ends = await asyncio.gather(*clients.tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError}, ends
        return clients

    clients = run(main())
    assert_idle(engine)
    clients.compare()
    done = clients.done
    assert done["operations"] == OPERATIONS and OPERATIONS * len(RUNS) >= 2000
    assert min(done[name] for name in ("submit", "leave", "failed step", "whole", "bad ended by error")) > 0
