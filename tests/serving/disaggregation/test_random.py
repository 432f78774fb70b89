"""Requests come and are cancelled, workers fill up, leases expire: the tokens of all others are one engine's."""

import asyncio
import random
import threading

import pytest

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.request import SamplingParams
from tests.serving.disaggregation.workers import PAGE, FakeClock, one_engine, pair, prompt
from tests.serving.served import likeliest

STEPS = 250


def draw(choices):
    """A request; many begin alike, and lengths are around multiples of a page."""
    length = max(1, choices.choice([1, 2, 4, 7]) * PAGE + choices.choice([-1, 0, 1, 2]))
    tokens = [*prompt(3 * PAGE, choices.randrange(2)), *prompt(40, choices.randrange(3))][:length]
    params = SamplingParams(
        choices.randint(1, 12),
        temperature=choices.choice([0, 1.2]),
        seed=choices.randrange(100),
        n=choices.choice([1, 1, 1, 3]),
        ignore_eos=True,
        cache_salt=choices.choice(["", "", "tenant"]),
    )
    return tokens, params


@pytest.mark.parametrize("seed", range(8))
def test_random_operations(seed):
    choices, clock = random.Random(seed), FakeClock()
    kept = {"prefix_cache": choices.choice([None, "hash", "radix"])}
    limits = {"num_pages": choices.choice([12, 20, 64]), "max_sequences": choices.choice([3, 8])}
    prefill = {"clock": clock, "num_pages": choices.choice([9, 64]), "max_batch_tokens": choices.choice([3, 8, 100])}
    requests, cancelled = {}, set()
    decode = {"clock": clock, "on_failure": "recompute", "timeout": 1e9} | limits
    with pair(choices.choice(["shared", "tcp"]), prefill=prefill, decode=decode, **kept) as workers:
        for step in range(STEPS):
            if choices.random() < 0.2:
                requests[str(step)] = draw(choices)
                workers.decode.add_request(str(step), *requests[str(step)])
            if requests and choices.random() < 0.06:
                name = choices.choice(sorted(requests))
                if workers.decode.abort(name):
                    cancelled.add(name)
            if choices.random() < 0.02:
                clock.now += 31.0  # a lease, before it could be renewed
            for act in choices.choice([[workers.turn], [workers.prefill.turn], [workers.decode_turn]]):
                act()
            workers.prefill.check_invariants()
        workers.finish(5000)
        expired = workers.prefill.expired
        assert expired <= len(workers.decode.failures) + len(cancelled)
        assert expired > 5 or seed not in (0, 3), "of these seeds, many leases expire"
        got = {key: tokens for key, tokens in workers.results.tokens.items() if key[0] not in cancelled}
    expected = one_engine({name: request for name, request in requests.items() if name not in cancelled})
    assert got == expected and len(got) > 20


def test_behind_asyncio():
    """A decode worker is an engine: coroutines submit to it and cancel, and a thread computes the prompts."""

    async def answer(served, length):
        stream = await served.submit(prompt(length), likeliest(6))
        return [output.token_id async for output in stream]

    async def serve(served):
        abandoned = await served.submit(prompt(40), likeliest(20))
        abandoned.close()
        answers = await asyncio.gather(*(answer(served, length) for length in (1, 5, 9, 30)))
        await served.shutdown()
        return answers

    with pair() as workers:
        thread = threading.Thread(target=workers.prefill.serve)
        thread.start()
        try:
            answers = asyncio.run(serve(AsyncEngine(workers.decode)))
        finally:
            workers.decode.close()
            thread.join(30)
        assert not thread.is_alive()
        expected = one_engine({str(length): (prompt(length), likeliest(6)) for length in (1, 5, 9, 30)})
        assert [tuple(tokens) for tokens in answers] == list(expected.values())
        workers.assert_empty()
