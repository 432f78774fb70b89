"""Whoever has the longest kept prefix goes first, and nobody is overtaken more often than the bound says."""

import random

import pytest

from tests.serving import told_pages
from tests.serving.served import engine, finish, greedy, likeliest, prompt
from tests.serving.test_engine_prefix import DESIGNS, ask

SYSTEM = prompt(16)
both = pytest.mark.parametrize("design", DESIGNS)


def finished(served):
    """Names of requests in the order in which they ended."""
    return [name for name, _ in finish(served).reasons]


@both
@pytest.mark.parametrize("most", [0, 1, 2, 3, 9])
def test_a_request_is_overtaken_as_often_as_the_bound_says(design, most):
    """One at a time: a stranger, then five that share a system prompt."""
    served = engine(60, 4, prefix_cache=design, most_overtakes=most, max_sequences=1)
    ask(served, SYSTEM, likeliest(1))
    served.add_request("stranger", prompt(9), likeliest(3))
    for number in range(5):
        served.add_request(f"{number}", SYSTEM + prompt(3, number), likeliest(2))
    results = finish(served)
    order = [name for name, _ in results.reasons]
    assert order.index("stranger") == min(most, 5)
    assert [name for name in order if name != "stranger"] == list("01234"), "equals go as they came"
    assert results.tokens["stranger", 0] == greedy(prompt(9), 3)


@both
def test_the_longest_prefix_goes_first_and_one_that_was_swapped_has_all_of_its_own(design):
    served = engine(60, 4, num_swap_pages=60, prefix_cache=design, most_overtakes=9, max_sequences=1, preemption="swap")
    ask(served, SYSTEM, likeliest(1))
    served.add_request("swapped", prompt(13), likeliest(3))
    served.step()
    for name, shared in (("none", 0), ("two pages", 8), ("four pages", 16), ("three pages", 12)):
        served.add_request(name, SYSTEM[:shared] + prompt(4, 7), likeliest(1))
    served.scheduler.preempt(served.scheduler.running[0])
    assert finished(served) == ["four pages", "swapped", "three pages", "two pages", "none"]


@pytest.mark.parametrize("most", [1, 3])
def test_nobody_starves_in_a_stream_of_requests_with_longer_prefixes(most):
    """Places in the queue and bounds, counted over many arrivals in random order."""
    choices, let_in, place = random.Random(most), [], {}
    served = told_pages.engine(40, 4, prefix_cache="radix", most_overtakes=most, max_sequences=2)
    real = served.scheduler._admit_next

    def admit():
        sequence = real()
        if sequence and sequence.num_output_tokens == 0:
            let_in.append(sequence.request_id)
            assert sequence.num_overtaken <= most
        return sequence

    served.scheduler._admit_next = admit
    for number in range(120):
        shared = choices.choice([0, 0, 4, 8, 16])
        tokens = (1,) * shared + tuple(choices.randrange(2, 13) for _ in range(5))
        served.add_request(str(number), tokens, likeliest(choices.choice([1, 2, 4])))
        place[str(number)] = len(let_in) + len(served.scheduler.waiting)
        for _ in range(choices.choice([0, 1, 2])):
            served.step()
            served.check_invariants()
    finish(served)
    assert sorted(let_in) == sorted(place) and let_in != list(place)
    assert all(let_in.index(name) < place[name] + most for name in place)


@pytest.mark.parametrize("options", [{"most_overtakes": 1}, {"prefix_cache": "hash", "most_overtakes": -1}])
def test_a_bound_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="most_overtakes is 0, or more"):
        engine(**options)


@both
def test_nobody_is_looked_up_while_as_many_run_as_may(design, monkeypatch):
    """Each step would hash the beginnings of the whole queue, for nothing."""
    served, calls = engine(60, 4, prefix_cache=design, most_overtakes=2, max_sequences=2), []
    for number in range(5):
        served.add_request(str(number), SYSTEM + prompt(3, number), likeliest(6))
    served.step()
    real = served.prefix.index.match
    monkeypatch.setattr(served.prefix.index, "match", lambda *looked_up: calls.append(1) or real(*looked_up))
    for _ in range(4):
        served.step()
    assert len(served.scheduler.running) == 2 and not calls
    finish(served)
    assert calls
