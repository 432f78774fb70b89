"""Ctrl-C at any line of a step, of adding and of aborting: no token is lost, and nothing is left half done."""

import contextlib
import itertools

import pytest

from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.serving import faults
from tests.serving.faults import interrupt_at
from tests.serving.random_operations import Outcome
from tests.serving.served import Results, assert_idle, finish, step
from tests.serving.test_engine_isolation import PREEMPTIONS, expected, requests


@pytest.mark.parametrize("preemption", PREEMPTIONS)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_interrupt_at_any_line_of_a_step_loses_nothing(steps, preemption):
    """The first of these steps computes prompts and forks, the last ends samples."""
    kind = next(k for k, (_, params) in enumerate(requests()) if params.n == 3 and params.max_tokens == 5)
    lines, noted, caught = 10**9, 0, 0
    count = 1
    while count <= lines:
        served, results = (
            Engine(faults.model(), 14, 2, 20, preemption=preemption, tokenizer=faults.Tokenizer()),
            Results(),
        )
        for name in "ab":
            served.add_request(name, *requests()[kind])
        for _ in range(steps):
            step(served, results)
        with interrupt_at(count) as seen:
            try:
                results.take(served.step())
                lines = min(lines, seen[0])
            except KeyboardInterrupt:
                caught += 1
                noted += bool(served._made)
        finish(served, results)
        for name in "ab":
            assert {sample: Outcome.of(results, name, sample) for sample in range(3)} == expected(kind), count
        count += 1 if count < 60 else 11
    assert caught > 50 and noted > 10


@pytest.mark.parametrize("call", ["add_request", "abort"])
def test_an_interrupt_of_adding_and_aborting_leaves_all_or_nothing(call):
    caught, count, lines = 0, 1, 10**9
    while count <= lines:
        served = Engine(faults.model(), 14, 2, tokenizer=faults.Tokenizer())
        served.add_request("a", *requests()[0])
        served.step()
        with interrupt_at(count, skip=()) as seen:
            try:
                served.add_request("b", *requests()[1]) if call == "add_request" else served.abort("a")
                lines = seen[0]
            except KeyboardInterrupt:
                caught += 1
        served.check_invariants()
        assert set(served.requests) <= {"a", "b"}
        for name in list(served.requests):
            served.abort(name)
        assert_idle(served)
        count += 1
    assert caught > 10


def test_an_abort_of_a_request_whose_last_tokens_nobody_has_seen():
    served, kind = Engine(faults.model(), 14, 2), ((9, 10, 11), SamplingParams(max_tokens=1, temperature=0))
    for count in itertools.count(1):
        for name in "ab":
            served.add_request(name, *kind)
        with interrupt_at(count), contextlib.suppress(KeyboardInterrupt):
            served.step()
        if served._made:
            break
        for name in "ab":
            served.abort(name)
    assert served.has_unfinished and not served.requests
    with pytest.raises(ValueError, match="'a' is being served already"):
        served.add_request("a", *kind)
    assert served.abort("a") is True and served.abort("a") is False
    assert [output.request_id for output in served.step()] == ["b"]
    assert_idle(served)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_fork_that_fails_loses_no_sample(monkeypatch, error):
    """The second of three samples, when the prompt has been computed and all three tokens are chosen."""
    kind = next(k for k, (_, params) in enumerate(requests()) if params.n == 3 and params.max_tokens == 5)
    served, results, forks = Engine(faults.model(), 14, 2, tokenizer=faults.Tokenizer()), Results(), []
    served.add_request("a", *requests()[kind])
    (sequence,) = served.requests["a"]
    fork = type(sequence).fork

    def failing(self, sample):
        forks.append(sample)
        if len(forks) == 2:
            raise error
        return fork(self, sample)

    monkeypatch.setattr(type(sequence), "fork", failing)
    with pytest.raises(error):
        finish(served, results)
    served.check_invariants()
    finish(served, results)
    assert {sample: Outcome.of(results, "a", sample) for sample in range(3)} == expected(kind)
