"""Operations in random order, invariants after each, and at the end the tokens of each request served alone.

An operation adds a request, steps, steps with a model that fails, aborts, or makes a running sequence give way.
21,600 of them in an ordinary run; with INFRA_LONG=1 in the environment 30 times as many, in a few minutes.
"""

import functools
import itertools
import os
import random
from collections import Counter

import pytest
import torch

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.serving.served import Results, assert_idle, finish

CONFIG = ModelConfig(31, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
PREEMPTIONS = {"recompute": 0, "swap": 60, "swap, too little": 9}
RUNS = list(itertools.product([1, 2, 4, 16], PREEMPTIONS, [0, 1, 2]))
OPERATIONS = 600 * (30 if os.environ.get("INFRA_LONG") == "1" else 1)
LONGEST = 36  # slots that any request below needs


class Broken(Exception):
    pass


@functools.cache
def model():
    """Large weights in float64, so that no rounding decides which token is likeliest."""
    decoder = Decoder(CONFIG).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 * parameter.shape[1] ** -0.5, generator=generator)
    return decoder


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
    """Tokens and reasons of one request in an engine that has all the room and nothing else to do."""
    served = Engine(model(), 200, 16)
    served.add_request("alone", *requests()[kind])
    results = finish(served)
    return {sample: (tokens, results.reasons[name, sample]) for (name, sample), tokens in results.tokens.items()}


class Run:
    """One engine with little room, and what was asked of it."""

    def __init__(self, page_size, preemption, seed):
        self.choices = random.Random(f"{page_size}/{preemption}/{seed}")
        self.served = Engine(
            model(),
            -(-LONGEST // page_size) + self.choices.choice([0, 1, 3]),
            page_size,
            PREEMPTIONS[preemption] // page_size + 1 if PREEMPTIONS[preemption] else 0,
            max_batch_tokens=self.choices.choice([5, 8, 17, 100]),
            max_sequences=self.choices.choice([3, 6]),
            preemption=preemption.split(",")[0],
        )
        self.results, self.kinds, self.aborted, self.done = Results(), {}, set(), Counter()

    def operate(self):
        """One random operation; one that is impossible now becomes a step."""
        name = self.choices.choices(["step", "add", "abort", "preempt", "fail"], [60, 14, 2, 20, 4])[0]
        running = self.served.scheduler.running
        if name == "add" and len(self.served.requests) < 8:
            request_id = f"request {len(self.kinds)}"
            self.kinds[request_id] = self.choices.randrange(len(requests()))
            self.served.add_request(request_id, *requests()[self.kinds[request_id]])
        elif name == "abort" and self.served.requests:
            request_id = self.choices.choice(list(self.served.requests))
            states = {sequence.status for sequence in self.served.requests[request_id]}
            assert self.served.abort(request_id)
            self.aborted.add(request_id)
            self.done.update(f"abort while {state.value}" for state in states)
        elif name == "preempt" and running:
            sequence = self.choices.choice(running)
            self.served.scheduler.preempt(sequence)
            self.done[f"preempt to {sequence.status.value}"] += 1
        elif name == "fail":
            self._fail()
        else:
            name = "step"
            self.results.take(self.served.step())
        self.served.check_invariants()
        self.done[name] += 1

    def _fail(self):
        """A step in which the model breaks down after its layers, if it comes to be asked."""
        model().norm.forward = self._break
        try:
            self.results.take(self.served.step())
        except Broken:
            self.done["failures"] += 1
        finally:
            del model().norm.forward

    @staticmethod
    def _break(x):
        raise Broken

    def compare(self):
        """Whoever was not aborted has all its tokens; whoever was has the first of them."""
        for request_id, kind in self.kinds.items():
            for sample, (tokens, reason) in expected(kind).items():
                got = self.results.tokens.get((request_id, sample), ())
                if request_id in self.aborted:
                    assert got == tokens[: len(got)]
                else:
                    assert (got, self.results.reasons[request_id, sample]) == (tokens, reason)
        assert {name for name, _ in self.results.tokens} <= set(self.kinds)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page_size, preemption, seed", RUNS)
def test_any_order_of_operations(page_size, preemption, seed, record_property):
    run = Run(page_size, preemption, seed)
    for _ in range(OPERATIONS):
        run.operate()
    finish(run.served, run.results)
    assert_idle(run.served)
    run.compare()
    operations = sum(run.done[name] for name in ("step", "add", "abort", "preempt", "fail"))
    print(f"{operations} operations: {dict(run.done)}, {len(run.kinds)} requests, {len(run.aborted)} aborted")
    record_property("operations", operations)
    assert operations == OPERATIONS and OPERATIONS * len(RUNS) >= 20_000
    assert min(run.done[name] for name in ("add", "abort", "preempt", "failures")) > 2
    assert run.done["preempt to swapped" if preemption == "swap" else "preempt to waiting"] > 10


def test_requests_alone_end_for_every_reason_and_fit_the_smallest_pool():
    outcomes = [outcome for kind in range(len(requests())) for outcome in expected(kind).values()]
    assert {reason for _, reason in outcomes} == {"stop", "length"}
    assert all(len(text) + params.max_tokens - 1 <= LONGEST for text, params in requests())
