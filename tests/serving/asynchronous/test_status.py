"""What an engine tells about itself while it serves, and reading all that has come at once."""

import asyncio
import hashlib

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.asynchronous.errors import EngineStopped
from minilib.serving.asynchronous.status import EngineStatus
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.model.random_weights import randomize
from tests.serving import faults
from tests.serving.asynchronous.test_async_engine import complete, gated, run, until
from tests.serving.served import POSITIONS, VOCAB, engine, greedy, likeliest, prompt, watch_preemptions


def test_counts_are_those_of_the_requests():
    async def main():
        served = engine(64, 16, prefix_cache="hash")
        async with AsyncEngine(served) as behind:
            assert behind.status() == EngineStatus("ready", num_pages=64, num_free_pages=64)
            await complete(behind, prompt(40), likeliest(5))
            before = behind.status()
            assert (before.prompt_tokens, before.cached_tokens, before.generated_tokens) == (40, 0, 5)
            assert (before.steps, before.num_running, before.num_free_pages) == (5, 0, 64)
            await complete(behind, prompt(40), SamplingParams(5, n=3, seed=0))
            after = behind.status()
            assert (after.prompt_tokens, after.cached_tokens, after.generated_tokens) == (80, 32, 20)
            assert after.preemptions == after.restarts == 0

    run(main())


def test_who_waits_and_who_runs_is_told_while_a_step_runs():
    async def main():
        served = engine(max_sequences=1)
        with gated(served) as gate:
            async with AsyncEngine(served) as behind:
                first = asyncio.create_task(complete(behind, prompt(20), likeliest(5)))
                await until(lambda: served.scheduler.running)
                second = asyncio.create_task(complete(behind, prompt(9), likeliest(5)))
                await until(lambda: behind.num_waiting == 2)
                told = behind.status()
                assert (told.state, told.num_running, told.num_waiting, told.num_free_pages) == ("ready", 1, 2, 62)
                gate.open()
                await asyncio.gather(first, second)
                assert behind.status().num_waiting == 0

    run(main())


def test_preemptions_are_counted():
    async def main():
        served = engine(20, 2)
        seen = watch_preemptions(served)
        async with AsyncEngine(served) as behind:
            await asyncio.gather(*(complete(behind, prompt(9 + n), likeliest(20)) for n in range(3)))
            assert seen and behind.status().preemptions == len(seen)

    run(main())


def test_the_state_says_whether_requests_are_taken():
    async def main():
        served = engine()
        with gated(served) as gate:
            behind = AsyncEngine(served)
            stream = await behind.submit(prompt(9), likeliest(4))
            drain = asyncio.create_task(behind.drain())
            await until(lambda: behind.status().state == "draining")
            gate.open()
            await drain
            assert behind.status().state == "stopped"
            assert [output.token_id for output in await stream.get_many()] == list(greedy(prompt(9), 4))
            try:
                await behind.submit(prompt(9))
            except EngineStopped:
                return
        raise AssertionError("a stopped engine took a request")

    run(main())


def test_a_description_names_the_model():
    async def main():
        found = []
        for seed in (1, 1, 2):
            model = Decoder(ModelConfig(37, 16, 24, 1, 2, 1, 8, max_position=64))
            randomize(model, seed=seed)
            async with AsyncEngine(Engine(model, 8, 4)) as behind:
                found.append(behind.description)
        return found

    same, again, other = run(main())
    assert same == again and same.fingerprint != other.fingerprint
    assert (same.max_length, same.vocab_size, same.page_size, same.num_pages) == (33, 37, 4, 8)
    assert len(bytes.fromhex(same.fingerprint)) == hashlib.sha256().digest_size
    big = AsyncEngine(engine(64, 16))
    assert (big.description.max_length, big.description.vocab_size) == (POSITIONS, VOCAB)
    big.stop()


def test_all_that_has_come_is_read_at_once():
    async def main():
        async with AsyncEngine(faults.faulty_engine(40, 4)) as behind:
            stream = await behind.submit((9, 10), likeliest(5))
            one = await anext(stream)
            await until(lambda: behind.status().generated_tokens == 5)
            await asyncio.sleep(0.01)
            rest = await stream.get_many()
            assert await stream.get_many() == [] and [o async for o in stream] == []
            whole = [o async for o in await behind.submit((9, 10), likeliest(5))]
            assert [o[1:] for o in [one, *rest]] == [o[1:] for o in whole]
            left = await behind.submit((9, 10), likeliest(30))
            assert await left.get_many()
            left.close()
            assert await left.get_many() == []

    run(main())
