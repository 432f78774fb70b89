"""Requests that stop for every reason, preempted, aborted and behind failures, get the tokens that they get alone.

21,600 operations in an ordinary run; with INFRA_LONG=1 in the environment 30 times as many, in a few minutes.
"""

import functools
import itertools
import random

import pytest

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.model.random_weights import randomize
from tests.serving.faults import failing_step
from tests.serving.random_operations import LEAST_OPERATIONS, OPERATIONS, RandomOperations, served_alone

CONFIG = ModelConfig(31, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
PREEMPTIONS = {"recompute": 0, "swap": 60, "swap, too little": 9}
RUNS = list(itertools.product([1, 2, 4, 16], PREEMPTIONS, [0, 1, 2]))
SHARES = {"step": 60, "add": 14, "abort": 2, "preempt": 20, "fail": 4}
LONGEST = 36  # slots that any request below needs


@functools.cache
def model():
    """Weights so large, in float64, that no rounding decides which token is likeliest."""
    return randomize(Decoder(CONFIG).double(), seed=5, scale=2)


@functools.cache
def requests():
    """(prompt, params) of all kinds, with lengths around multiples of every page size."""
    kinds, chosen = random.Random(1), []
    for length in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20] * 4:
        text = tuple(kinds.randrange(CONFIG.vocab_size) for _ in range(length))
        heat = kinds.choice([0, 0.8, 2.0])
        count, n = kinds.choice([1, 2, 5, 9, 16]), kinds.choice([1, 1, 2, 3])
        top_k, top_p = kinds.choice([0, 5]), kinds.choice([1.0, 0.9])
        stops = tuple(kinds.sample(range(CONFIG.vocab_size), kinds.choice([0, 3])))
        chosen.append((text, SamplingParams(count, heat, top_k, top_p, length + count, n, (), stops)))
    return chosen


@functools.cache
def expected(kind):
    return served_alone(Engine(model(), 200, 16), *requests()[kind])


def crowded(page_size, preemption, seed):
    """Random operations on an engine with little room."""
    choices = random.Random(f"{page_size}/{preemption}/{seed}")
    served = Engine(
        model(),
        -(-LONGEST // page_size) + choices.choice([0, 1, 3]),
        page_size,
        PREEMPTIONS[preemption] // page_size + 1 if PREEMPTIONS[preemption] else 0,
        max_batch_tokens=choices.choice([5, 8, 17, 100]),
        max_sequences=choices.choice([3, 6]),
        preemption=preemption.split(",")[0],
    )
    return RandomOperations(served, choices, requests(), expected, SHARES, {"fail": failing_step})


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page_size, preemption, seed", RUNS)
def test_any_order_of_operations(page_size, preemption, seed, record_property):
    operations = crowded(page_size, preemption, seed)
    operations.run()
    record_property("operations", OPERATIONS)
    assert OPERATIONS * len(RUNS) >= LEAST_OPERATIONS
    done = operations.done
    assert min(done[name] for name in ("add", "abort", "preempt", "failed")) > 2
    assert done["preempt to swapped" if preemption == "swap" else "preempt to waiting"] > 10


def test_requests_alone_end_for_every_reason_and_fit_the_smallest_pool():
    outcomes = [outcome for kind in range(len(requests())) for outcome in expected(kind).values()]
    assert {outcome.reason for outcome in outcomes} == {"stop", "length"}
    assert all(len(text) + params.max_tokens - 1 <= LONGEST for text, params in requests())
