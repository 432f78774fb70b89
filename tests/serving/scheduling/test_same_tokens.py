"""Whatever the policy, the budget, the pages and who gives way: the same tokens."""

import functools
import itertools

import pytest

from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.model.random_weights import randomize
from tests.serving.faults import failing_step
from tests.serving.random_operations import RandomOperations, served_alone
from tests.serving.scheduling.policies import CONFIG, POLICIES, counted, drawn, numbers
from tests.serving.served import Results, engine, finish, greedy, likeliest, prompt, step, watch_preemptions

COUNT = 14
LENGTHS = [1, 3, 9, 16, 17, 5, 33, 2]
SHARES = {"step": 60, "add": 14, "abort": 2, "preempt": 20, "fail": 4}
CUTS = list(itertools.product([1, 4, 16], [("recompute", 0), ("swap", 60), ("swap", 5)]))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("page_size, budget, preemption, swap_pages", [
    (2, 100, "recompute", 0), (16, 7, "recompute", 0), (2, 9, "swap", 300), (1, 3, "swap", 20), (1, 1, "recompute", 0),
])  # fmt: skip
def test_greedy_tokens_are_those_of_transformers(name, page_size, budget, preemption, swap_pages):
    pages = -(-(max(LENGTHS) + COUNT - 1) // page_size) + 1
    served = counted(
        engine(
            pages,
            page_size,
            num_swap_pages=swap_pages,
            preemption=preemption,
            max_batch_tokens=budget,
            policy=POLICIES[name](),
        )
    )
    given_way, results, choices = watch_preemptions(served), Results(), numbers(name)
    for length in LENGTHS:
        served.add_request(str(length), prompt(length), likeliest(COUNT), drawn(choices, served.clock()))
        step(served, results)
    finish(served, results)
    assert {length: results.tokens[str(length), 0] for length in LENGTHS} == {
        length: greedy(prompt(length), COUNT) for length in LENGTHS
    }
    assert given_way or page_size == 16 or budget == 1, "nobody had to give way"


@functools.cache
def model():
    """Weights so large, in float64, that no rounding decides which token is likeliest."""
    return randomize(Decoder(CONFIG).double(), seed=5, scale=2)


@functools.cache
def requests():
    """(prompt, params) of all kinds."""
    choices, chosen = numbers("kinds"), []
    for length in [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 20] * 2:
        text = tuple(choices.randrange(CONFIG.vocab_size) for _ in range(length))
        count, n = choices.choice([1, 2, 5, 9, 16]), choices.choice([1, 1, 2, 3])
        chosen.append((text, SamplingParams(count, choices.choice([0, 0.8]), seed=length, n=n)))
    return chosen


@functools.cache
def expected(kind):
    return served_alone(Engine(model(), 200, 16), *requests()[kind])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", POLICIES)
def test_any_order_of_operations(name):
    """Adding, stepping, aborting, giving way, failing; every cut of pages and swap space, once for each policy."""
    total, done = numbers(name), 0
    for number, (page_size, (preemption, slots)) in enumerate(CUTS):
        choices = numbers(f"{name}/{number}")
        served = counted(
            Engine(
                model(),
                -(-36 // page_size) + choices.choice([0, 1, 3]),
                page_size,
                slots // page_size,
                max_batch_tokens=choices.choice([5, 8, 17, 100]),
                max_sequences=choices.choice([3, 6]),
                preemption=preemption,
                policy=POLICIES[name](),
            )
        )
        kinds = [(*request, drawn(total, 10**6)) for request in requests()]
        operations = RandomOperations(served, choices, kinds, expected, SHARES, {"fail": failing_step})
        operations.run()
        done += operations.done["preempt"]
    assert done > 200
