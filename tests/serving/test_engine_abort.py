"""Leaving early and breaking down: an abort frees everything in any state, and no failure loses a token."""

import pytest
import torch

from minilib.mechanisms.paging import OutOfFrames
from minilib.serving.cache import paged
from minilib.serving.request import SamplingParams
from minilib.serving.sequence import Status
from tests.serving.served import (
    Results,
    alone,
    assert_idle,
    engine,
    finish,
    greedy,
    likeliest,
    prompt,
    step,
)

COUNT = 12
OTHER = prompt(9)


def sequence_of(served, name, sample=0):
    return next(sequence for sequence in served.requests[name] if sequence.sample == sample)


def waiting():
    served = engine(max_sequences=1)
    served.add_request("other", OTHER, likeliest(COUNT))
    served.add_request("a", prompt(20), likeliest(COUNT))
    step(served, Results())
    assert sequence_of(served, "a").status is Status.WAITING
    return served


def half_prefilled():
    served = engine(page_size=2, max_batch_tokens=12)
    served.add_request("other", OTHER, likeliest(COUNT))
    served.add_request("a", prompt(20), likeliest(COUNT, n=2))
    served.step()
    assert 0 < sequence_of(served, "a").num_computed_tokens < 20
    return served


def running():
    served = engine(page_size=2)
    served.add_request("other", OTHER, likeliest(COUNT))
    served.add_request("a", prompt(20), likeliest(COUNT))
    for _ in range(3):
        served.step()
    assert sequence_of(served, "a").status is Status.RUNNING
    return served


def given_way(preemption, status):
    served = engine(page_size=2, num_swap_pages=64, preemption=preemption)
    served.add_request("other", OTHER, likeliest(COUNT))
    served.add_request("a", prompt(20), likeliest(COUNT, n=2))
    for _ in range(3):
        served.step()
    served.scheduler.preempt(sequence_of(served, "a", 1))
    assert sequence_of(served, "a", 1).status is status
    return served


def one_sample_finished():
    params = SamplingParams(max_tokens=COUNT, temperature=1.5, seed=3, n=3)
    first, second, third = alone(prompt(17), params)
    end = next(token for token in second if token not in first + third)
    served, results = engine(eos_token_id=end), Results()
    served.add_request("other", OTHER, likeliest(COUNT, ignore_eos=True))
    served.add_request("a", prompt(17), params)
    while ("a", 1) not in results.reasons:
        step(served, results)
    assert [sequence.sample for sequence in served.requests["a"]] == [0, 2]
    return served


STATES = {
    "waiting": waiting,
    "half-prefilled": half_prefilled,
    "running": running,
    "swapped": lambda: given_way("swap", Status.SWAPPED),
    "preempted": lambda: given_way("recompute", Status.WAITING),
    "one sample finished": one_sample_finished,
}


@pytest.mark.parametrize("state", STATES)
def test_an_abort_frees_everything_in_any_state(state):
    served = STATES[state]()
    generated = len(OTHER) + COUNT - len(sequence_of(served, "other").token_ids)
    assert served.abort("a") is True
    served.check_invariants()
    assert "a" not in served.requests
    results = finish(served)
    assert set(results.tokens) == {("other", 0)}
    assert results.tokens["other", 0] == greedy(OTHER, COUNT)[COUNT - generated :]


@pytest.mark.parametrize("state", STATES)
def test_an_abort_of_all_leaves_nothing(state):
    served = STATES[state]()
    for name in list(served.requests):
        served.abort(name)
    assert_idle(served)
    assert served.step() == []
    served.add_request("a", OTHER, likeliest(COUNT))  # the name is free again
    assert finish(served).tokens["a", 0] == greedy(OTHER, COUNT)


def test_an_abort_before_the_first_step_and_of_what_is_not_there():
    served = engine()
    assert served.abort("a") is False
    served.add_request("a", OTHER)
    assert served.abort("a") is True
    assert served.abort("a") is False
    assert_idle(served)


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_that_fails_in_the_middle_of_a_step_loses_nothing(layer, preemption, error):
    """Every third forward pass fails, before or after the first layer has written its keys."""
    served = engine(22, 2, num_swap_pages=30, max_batch_tokens=15, preemption=preemption)
    results, calls, failures = Results(), [0], 0
    real = served.model.layers[layer].forward

    def forward(*inputs):
        out = real(*inputs)
        calls[0] += 1
        if calls[0] % 3 == 0 and calls[0] < 60:
            raise error("in the middle")
        return out

    params = SamplingParams(max_tokens=COUNT, temperature=1.5, seed=3, n=3)
    served.add_request("a", OTHER, likeliest(COUNT))
    served.add_request("b", prompt(17), params)
    served.add_request("c", prompt(20), likeliest(COUNT))
    served.model.layers[layer].forward = forward
    try:
        while served.has_unfinished:
            try:
                step(served, results)
            except error:
                failures += 1
                served.check_invariants()
            assert failures < 100
    finally:
        del served.model.layers[layer].forward
    assert failures > 10
    assert_idle(served)
    assert results.tokens["a", 0] == greedy(OTHER, COUNT)
    assert [results.tokens["b", sample] for sample in range(3)] == alone(prompt(17), params)
    assert results.tokens["c", 0] == greedy(prompt(20), COUNT)


def test_an_abort_after_a_failure_frees_everything():
    served = engine(page_size=2)
    served.add_request("a", prompt(20), likeliest(COUNT, n=2))
    served.step()
    real, served.model.forward = served.model.forward, None
    try:
        with pytest.raises(TypeError):
            served.step()
    finally:
        del served.model.forward
    assert served.model.forward == real
    served.check_invariants()
    served.abort("a")
    assert_idle(served)


def failing_once(error, real):
    """A function that raises the first time that it is given something to do."""
    failed = []

    def function(given):
        if given and not failed:
            failed.append(given)
            raise error
        return real(given)

    return function


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()])
def test_a_copy_of_pages_that_fails_loses_nothing(error):
    """Copy-on-write happens while the step is planned, before the model runs."""
    served, results = engine(page_size=2), Results()
    params = SamplingParams(max_tokens=COUNT, temperature=1.5, seed=3, n=3)
    served.add_request("a", prompt(17), params)
    step(served, results)
    served.cache.copy = failing_once(error, served.cache.copy)
    with pytest.raises(type(error)):
        served.step()
    served.check_invariants()
    finish(served, results)
    assert [results.tokens["a", sample] for sample in range(3)] == alone(prompt(17), params)


@pytest.mark.parametrize("direction", ["swap_out", "swap_in"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()])
def test_swapping_that_fails_loses_nothing(monkeypatch, error, direction):
    """The pages have been moved, their content has not."""
    served, results = engine(14, 2, num_swap_pages=30, preemption="swap"), Results()
    for name in "abc":
        served.add_request(name, prompt(9, seed=ord(name)), likeliest(COUNT))
    real = getattr(served.cache, direction)

    def swap(table):
        with monkeypatch.context() as patch:
            patch.setattr(paged, "_copy", lambda source, target, copies: fail(copies))
            return real(table)

    fail = failing_once(error, lambda copies: None)
    setattr(served.cache, direction, swap)
    with pytest.raises(type(error)):
        finish(served, results)
    setattr(served.cache, direction, real)
    served.check_invariants()
    finish(served, results)
    assert all(results.tokens[name, 0] == greedy(prompt(9, seed=ord(name)), COUNT) for name in "abc")


def test_a_sequence_stays_where_it_is_if_there_is_no_room_to_swap_it():
    served = engine(14, 2, num_swap_pages=1, preemption="swap")
    served.add_request("a", OTHER, likeliest(COUNT))
    results = Results()
    step(served, results)
    with pytest.raises(OutOfFrames):
        served.cache.swap_out(sequence_of(served, "a").table)
    served.check_invariants()
    assert finish(served, results).tokens["a", 0] == greedy(OTHER, COUNT)
