"""Requests that begin alike share pages, in any order of steps, preemptions, aborts, forks, failures and moves between
tiers, and get what they get alone.

21,600 operations in an ordinary run; with INFRA_LONG=1 in the environment 30 times as many.
"""

import functools
import itertools
import random

import pytest

from minilib.mechanisms.caching import Clock, Lfu, Lru, S3Fifo, Sieve
from minilib.serving.cache.tiers import SecondTier
from minilib.serving.request import SamplingParams
from tests.serving import told_pages
from tests.serving.random_operations import LEAST_OPERATIONS, OPERATIONS, RandomOperations, served_alone

PREEMPTIONS = {"recompute": 0, "swap": 80, "swap, too little": 9}
RUNS = list(itertools.product([1, 4, 16], PREEMPTIONS, ["hash", "radix"], [0, 1]))
SHARES = {"step": 54, "add": 18, "abort": 5, "preempt": 18, "fail": 5}
LONGEST = 36  # slots that any request below needs


@functools.cache
def requests():
    """(prompt, params): beginnings of a few texts, some continued, and chats that send an answer back."""
    choices, chosen = random.Random(1), []
    texts = [tuple(choices.randrange(told_pages.CONFIG.vocab_size) for _ in range(24)) for _ in range(3)]
    for length in [1, 3, 4, 5, 8, 9, 12, 15, 16, 17, 20] * 5:
        text = choices.choice(texts)[:length]
        if choices.random() < 0.3:
            text += (choices.randrange(told_pages.CONFIG.vocab_size),)
        params = SamplingParams(
            choices.choice([1, 2, 5, 9, 15]), choices.choice([0, 0, 1.0]), seed=length, n=choices.choice([1, 1, 2, 3])
        )
        chosen.append((text, params, choices.choice(["", "", "salt"])))
    for text, params, salt in chosen[::3]:
        answer = alone((text, SamplingParams(params.max_tokens, params.temperature, seed=params.seed, cache_salt=salt)))
        chat = text + answer[0].tokens + (0,)
        chosen.append((chat[: LONGEST - 5], SamplingParams(6, 0), salt))
    return [
        (text, SamplingParams(p.max_tokens, p.temperature, seed=p.seed, n=p.n, cache_salt=salt))
        for text, p, salt in chosen
    ]


def alone(request):
    return served_alone(told_pages.engine(50, 16), *request)


@functools.cache
def expected(kind):
    return alone(requests()[kind])


class Broken(Exception):
    """A failure of the model."""


def failing_step(engine, choices):
    """A step that breaks down when its pages have been written."""
    forward = engine._forward

    def broken(work, interrupts):
        forward(work, interrupts)
        raise Broken

    engine._forward = broken
    try:
        return engine.step(), ""
    except Broken:
        return [], "failed"
    finally:
        engine._forward = forward


def crowded(page_size, preemption, design, seed, folder):
    """Random operations on an engine with little room; pages that leave go to another tier if the seed is odd."""
    choices = random.Random(f"{page_size}/{preemption}/{design}/{seed}")
    served = told_pages.engine(
        -(-LONGEST // page_size) + choices.choice([0, 1, 3, 9]),
        page_size,
        PREEMPTIONS[preemption] // page_size + 1 if PREEMPTIONS[preemption] else 0,
        max_batch_tokens=choices.choice([5, 8, 17, 100]),
        max_sequences=choices.choice([3, 6]),
        preemption=preemption.split(",")[0],
        prefix_cache=design,
        second_tier=SecondTier(path=folder / "pages", num_pages=64 // page_size + 2) if seed % 2 else None,
        eviction=choices.choice([Lru, Lru, Clock, Lfu, Sieve, S3Fifo])(),
    )
    return RandomOperations(served, choices, requests(), expected, SHARES, {"fail": failing_step})


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page_size, preemption, design, seed", RUNS)
def test_any_order_of_operations(page_size, preemption, design, seed, record_property, tmp_path):
    operations = crowded(page_size, preemption, design, seed, tmp_path)
    operations.run()
    record_property("operations", OPERATIONS)
    assert OPERATIONS * len(RUNS) >= LEAST_OPERATIONS
    done, prefix = operations.done, operations.served.prefix
    assert min(done[name] for name in ("add", "abort", "preempt", "failed")) > 2
    assert done["preempt to swapped" if preemption == "swap" else "preempt to waiting"] > 10
    assert prefix.tokens_matched > 100 and prefix.index.evictions > 10
    assert prefix.tokens_loaded > 0 if seed % 2 else prefix.tokens_loaded == 0
    assert prefix.clear() == 0 and len(prefix.index) == 0
    prefix.pool.check_invariants([])


def test_the_requests_fit_the_smallest_pool():
    assert all(len(text) + params.max_tokens - 1 <= LONGEST for text, params in requests())
