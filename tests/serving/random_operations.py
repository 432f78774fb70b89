"""Operations in random order on an engine with little room, and what each request must have received at the end.

An operation adds a request, steps, aborts, makes a running sequence give way, or is a step in which a fault happens.
The engine's invariants are checked after each. At the end a request that nobody aborted has the tokens, the reason and
the text that it gets when it is served alone; an aborted one has the beginning of them.
"""

import os
from collections import Counter
from typing import NamedTuple

from tests.serving.served import Results, assert_idle, finish

OPERATIONS = 600 * (30 if os.environ.get("INFRA_LONG") == "1" else 1)  # in one run
LEAST_OPERATIONS = 20_000  # in all runs of one test
MOST_REQUESTS = 8  # unfinished at a time


class Outcome(NamedTuple):
    """All that one sample of a request received."""

    tokens: tuple
    reason: str | None
    text: str

    @classmethod
    def of(cls, results, request_id, sample):
        name = (request_id, sample)
        return cls(results.tokens.get(name, ()), results.reasons.get(name), results.texts.get(name, ""))


def served_alone(served, prompt, params):
    """The outcome of each sample of a request in an engine that has all the room and nothing else to do."""
    served.add_request("alone", prompt, params)
    results = finish(served)
    return {sample: Outcome.of(results, "alone", sample) for _, sample in results.reasons}


class RandomOperations:
    """One engine, and what was asked of it.

    Args:
        served: the engine, with room for fewer requests than are added.
        choices: the random.Random that draws operations and requests.
        requests: kinds of request, (prompt, params) each.
        expected: kind → the outcome of each sample when a request of this kind is served alone.
        shares: operation → how often it is drawn: "step", "add", "abort", "preempt", and the names of faults.
        faults: name → a function (engine, choices) → (outputs, event): a step in which something may go wrong, what
            came out of it, and what went wrong; no event if nothing did.

    Attributes:
        done: how often each operation and each event occurred, and how often a request ended for each reason.
    """

    def __init__(self, served, choices, requests, expected, shares, faults):
        self.served, self.choices, self.results, self.done = served, choices, Results(), Counter()
        self._requests, self._expected, self._shares, self._faults = requests, expected, shares, faults
        self._kinds, self._aborted = {}, set()

    def run(self):
        """OPERATIONS of them, then steps until nothing is unfinished; every outcome is compared."""
        for _ in range(OPERATIONS):
            self._operate()
        assert sum(self.done[name] for name in self._shares) == OPERATIONS
        finish(self.served, self.results)
        assert_idle(self.served)
        self._compare()

    def _operate(self):
        """One random operation; one that is impossible now becomes a step."""
        name = self.choices.choices(list(self._shares), list(self._shares.values()))[0]
        running = self.served.scheduler.running
        if name == "add" and len(self.served.requests) < MOST_REQUESTS:
            self._add(f"request {len(self._kinds)}")
        elif name == "abort" and self.served.requests:
            self._aborted.add(request_id := self.choices.choice(list(self.served.requests)))
            assert self.served.abort(request_id)
        elif name == "preempt" and running:
            sequence = self.choices.choice(running)
            self.served.scheduler.preempt(sequence)
            self.done[f"preempt to {sequence.status.value}"] += 1
        elif name in self._faults:
            outputs, event = self._faults[name](self.served, self.choices)
            self.results.take(outputs)
            self.done.update([event] if event else [])
        else:
            name = "step"
            self.results.take(self.served.step())
        self.served.check_invariants()
        self.done[name] += 1

    def _add(self, request_id):
        self._kinds[request_id] = self.choices.randrange(len(self._requests))
        self.served.add_request(request_id, *self._requests[self._kinds[request_id]])

    def _compare(self):
        for request_id, kind in self._kinds.items():
            for sample, alone in self._expected(kind).items():
                received = Outcome.of(self.results, request_id, sample)
                if request_id not in self._aborted:
                    assert received == alone
                    self.done[f"ended by {received.reason}"] += 1
                else:
                    assert received.tokens == alone.tokens[: len(received.tokens)]
                    assert alone.text.startswith(received.text)
        assert {request_id for request_id, _ in self.results.texts} <= set(self._kinds)
