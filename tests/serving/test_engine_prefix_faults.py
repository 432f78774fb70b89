"""What went wrong with one request is not kept for the next: pages whose keys and values may be wrong are forgotten."""

import contextlib
import itertools

import pytest
import torch

from minilib.serving.cache.tiers import SecondTier
from tests.serving.served import Results, engine, finish, greedy, likeliest, prompt, step
from tests.serving.test_engine_prefix import COUNT, DESIGNS, ask

both = pytest.mark.parametrize("design", DESIGNS)


@contextlib.contextmanager
def without_numbers(served, step_number, only=lambda position: True):
    """In one step, counted from 0, what the first layer passes on is NaN at some of the tokens."""
    layer, calls = served.model.layers[0], itertools.count()
    real = layer.forward

    def broken(*inputs):
        out = real(*inputs)
        if next(calls) == step_number:
            out[[only(position) for position in range(len(out))]] = torch.nan
        return out

    layer.forward = broken
    try:
        yield
    finally:
        del layer.forward


@both
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("budget, broken", [(100, 0), (9, 0), (9, 1), (9, 2)])
def test_a_step_that_made_no_numbers_harms_nobody_who_begins_alike(design, budget, broken, samples):
    """The prompt is computed at once, or in three steps, of which one goes wrong."""
    served = engine(60, 4, prefix_cache=design, max_batch_tokens=budget)
    with without_numbers(served, broken):
        served.add_request("a", prompt(21), likeliest(COUNT, n=samples))
        assert set(finish(served).reasons.values()) == {"error"}
    assert len(served.prefix.index) == served.cache.pool.num_idle == 0
    assert ask(served, prompt(21)) == (greedy(prompt(21), COUNT), 0, 21 + COUNT - 1)
    assert ask(served, prompt(21)) == (greedy(prompt(21), COUNT), 20, 1 + COUNT - 1)


@both
def test_pages_that_others_hold_or_continue_stay(design):
    """One that begins as two others do goes wrong; one of them runs, and one has ended."""
    served, results = engine(60, 4, prefix_cache=design), Results()
    ask(served, prompt(8) + prompt(9), likeliest(1))
    served.add_request("runs", prompt(8) + prompt(5), likeliest(COUNT))
    step(served, results)
    held = len(served.prefix.index)
    with without_numbers(served, 0, only=lambda position: position > 0):  # the first token is that of "runs"
        served.add_request("breaks", prompt(8) + prompt(7), likeliest(COUNT))
        step(served, results)
    assert results.reasons == {("breaks", 0): "error"} and len(served.prefix.index) == held
    assert finish(served, results).tokens["runs", 0] == greedy(prompt(8) + prompt(5), COUNT)
    assert ask(served, prompt(8) + prompt(9))[:2] == (greedy(prompt(8) + prompt(9), COUNT), 16)
    assert ask(served, prompt(8) + prompt(7))[:2] == (greedy(prompt(8) + prompt(7), COUNT), 8)


def test_what_made_no_numbers_never_reaches_another_tier():
    served = engine(8, 4, num_swap_pages=40, prefix_cache="hash", second_tier=SecondTier())
    with without_numbers(served, 0):
        served.add_request("a", prompt(21), likeliest(1))
        finish(served)
    ask(served, prompt(32), likeliest(1))
    assert ask(served, prompt(21)) == (greedy(prompt(21), COUNT), 0, 21 + COUNT - 1)


@both
def test_a_request_that_is_ended_by_an_error_reports_what_was_cached(design):
    served = engine(60, 4, prefix_cache=design)
    ask(served, prompt(20), likeliest(1))
    served.add_request("a", prompt(20) + prompt(3), likeliest(COUNT, n=2))
    assert [output.cached_tokens for output in served.fail("a", "before it ran")] == [0, 0]
    served.add_request("a", prompt(20) + prompt(3), likeliest(COUNT, n=2))
    assert [output.cached_tokens for output in served.step()] == [20, 20]
    assert [output.cached_tokens for output in served.fail("a", "its step raised")] == [20, 20]
    finish(served)
