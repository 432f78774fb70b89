"""Under every policy the simulator makes the engine's plans, and the engine behind asyncio its tokens."""

import asyncio
import random

import pytest

from minilib.mechanisms.scheduling import POLICIES
from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.engine import Engine
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.simulation import SimulatedEngine
from minilib.serving.request import SamplingParams, SchedulingParams
from tests.serving.asynchronous.test_async_engine import complete, run
from tests.serving.load.test_simulation import one_second, watch_plans
from tests.serving.served import assert_idle
from tests.serving.test_engine_random import CONFIG, expected, model, requests

SIZES = {"num_pages": 12, "page_size": 4, "max_batch_tokens": 8, "max_sequences": 5}


def scheduling(choices):
    return SchedulingParams(
        choices.randrange(4), choices.choice("ab"), choices.randint(1, 16), choices.uniform(1e3, 1e4)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_simulator_and_engine_take_the_same_decisions_under_every_policy(policy):
    choices, steps = random.Random(policy), [0]
    real = Engine(model(), policy=policy, clock=lambda: float(steps[0]), **SIZES)
    simulated = SimulatedEngine(CONFIG, one_second, VirtualClock(), policy=policy, **SIZES)
    simulated.clock = real.clock
    plans = [watch_plans(engine) for engine in (real, simulated)]
    for number in range(60):
        text = [choices.randrange(CONFIG.vocab_size) for _ in range(choices.randint(1, 20))]
        params = SamplingParams(choices.randint(1, 16), temperature=0, ignore_eos=True)
        request = str(number), text, params, scheduling(choices)
        for engine in (real, simulated):
            engine.add_request(*request)
        for _ in range(choices.choice([0, 1, 4])):
            real.step(), simulated.step()
            steps[0] += 1
    while real.has_unfinished or simulated.has_unfinished:
        real.step(), simulated.step()
        steps[0] += 1
    assert plans[0] == plans[1]
    assert_idle(real)
    assert_idle(simulated)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_behind_asyncio_passes_on_what_a_policy_looks_at(policy):
    choices, kinds = random.Random(policy), range(0, len(requests()), 3)

    async def main():
        async with AsyncEngine(Engine(model(), policy=policy, clock=lambda: 0.0, **SIZES)) as served:
            found = [complete(served, *requests()[kind], scheduling=scheduling(choices)) for kind in kinds]
            return await asyncio.gather(*found)

    for kind, found in zip(kinds, run(main()), strict=True):
        assert found == [outcome.tokens for _, outcome in sorted(expected(kind).items())]
