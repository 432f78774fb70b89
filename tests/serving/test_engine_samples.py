"""Seeds and samples: the same seed means the same tokens whatever happens around them; samples share their prompt."""

import pytest

from minilib.serving.request import SamplingParams
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
    watch_preemptions,
)

COUNT = 14


def drawn(seed, n=1, count=COUNT, **options):
    return SamplingParams(max_tokens=count, temperature=1.5, seed=seed, n=n, **options)


REQUESTS = {
    "plain": (prompt(15), drawn(1)),
    "two samples": (prompt(16), drawn(2, n=2)),
    "three samples": (prompt(17), drawn(3, n=3, top_k=40)),
    "nucleus": (prompt(33), drawn(4, n=2, top_p=0.8)),
    "greedy": (prompt(5), likeliest(COUNT)),
}


@pytest.fixture(scope="module")
def expected():
    return {
        (name, sample): tokens
        for name, (text, params) in REQUESTS.items()
        for sample, tokens in enumerate(alone(text, params))
    }


@pytest.mark.parametrize("preemption, swap_pages", [("recompute", 0), ("swap", 100), ("swap", 6)])
@pytest.mark.parametrize("page_size, num_pages", [(1, 60), (2, 30), (16, 4), (64, 1), (16, 64)])
@pytest.mark.parametrize("budget", [9, 1000])
def test_the_same_seed_draws_the_same_tokens_in_a_crowd_and_after_giving_way(
    expected, page_size, num_pages, preemption, swap_pages, budget
):
    served = engine(
        num_pages, page_size, num_swap_pages=swap_pages, preemption=preemption, max_batch_tokens=budget, max_sequences=6
    )
    given_way = watch_preemptions(served)
    for name, (text, params) in REQUESTS.items():
        served.add_request(name, text, params)
    assert finish(served).tokens == expected
    assert len(given_way) > 0 or num_pages * page_size > 60


def test_different_samples_and_seeds_differ_and_the_first_sample_is_that_of_n_1(expected):
    assert len({expected["three samples", sample] for sample in range(3)}) == 3
    assert alone(prompt(17), drawn(3, n=1, top_k=40)) == [expected["three samples", 0]]
    assert alone(prompt(17), drawn(3, n=2, top_k=40)) == [expected["three samples", s] for s in range(2)]
    others = {alone(prompt(15), drawn(seed))[0] for seed in range(10, 20)}
    assert len(others | {expected["plain", 0]}) == 11


def test_without_a_seed_every_request_draws_its_own():
    assert len({alone(prompt(15), drawn(None))[0] for _ in range(5)}) == 5


def test_greedy_samples_are_all_alike():
    assert alone(prompt(17), likeliest(COUNT, n=3)) == [greedy(prompt(17), COUNT)] * 3


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33])
def test_samples_share_the_pages_of_their_prompt(page_size, length):
    """Whole pages of the prompt are counted once; each sample has its own rest, the last partial page copied."""
    n, served, results, copied = 3, engine(300, page_size), Results(), []
    real = served.cache.copy
    served.cache.copy = lambda copies: (copied.extend(copies), real(copies))
    served.add_request("a", prompt(length), drawn(7, n=n))
    step(served, results)
    assert served.cache.pool.num_used == -(-length // page_size)
    shared = length // page_size
    for more in range(1, COUNT):
        tables = [sequence.table for sequence in served.scheduler.running]
        assert len(tables) == n and len({tuple(table.frames[:shared]) for table in tables}) == 1
        step(served, results)
        if more < COUNT - 1:
            own = -(-(length + more) // page_size) - shared
            assert served.cache.pool.num_used == shared + n * own
    assert len(copied) == (n - 1 if length % page_size else 0), "the last one to write needs no copy"
    assert_idle(served)
    assert [results.tokens["a", sample] for sample in range(n)] == alone(prompt(length), drawn(7, n=n))


@pytest.mark.parametrize("preemption, swap_pages", [("recompute", 0), ("swap", 40), ("swap", 4)])
@pytest.mark.parametrize("page_size, length", [(1, 8), (2, 7), (2, 8), (2, 9), (16, 15), (16, 17)])
def test_samples_fit_the_smallest_pool_that_serves_one_of_them(page_size, length, preemption, swap_pages):
    pages = -(-(length + COUNT - 1) // page_size)
    served = engine(pages, page_size, num_swap_pages=swap_pages, preemption=preemption)
    given_way = watch_preemptions(served)
    served.add_request("a", prompt(length), drawn(7, n=4))
    results = finish(served)
    assert [results.tokens["a", sample] for sample in range(4)] == alone(prompt(length), drawn(7, n=4))
    assert len(given_way) > 0


@pytest.mark.parametrize("budget", [6, 1000])
def test_max_sequences_counts_the_samples_that_a_prompt_will_become(budget):
    served, results, most = engine(300, 2, max_sequences=4, max_batch_tokens=budget), Results(), 0
    for number in range(6):
        served.add_request(str(number), prompt(9 + number), drawn(number, n=1 + number % 3))
    while served.has_unfinished:
        step(served, results)
        most = max(most, len(served.scheduler.running))
    assert most == 4
    assert len(results.tokens) == 12


def test_one_token_each_is_drawn_from_the_prompt_alone():
    served = engine()
    served.add_request("a", prompt(5), drawn(7, n=5, count=1))
    results = Results()
    results.take(served.step())
    assert_idle(served)
    assert sorted(results.reasons) == [("a", sample) for sample in range(5)]


def test_samples_that_end_at_different_times_leave_the_others_alone(expected):
    text, params = REQUESTS["three samples"]
    three = [expected["three samples", sample] for sample in range(3)]
    end = next(t for t in three[1][2:] if t not in three[0] + three[2] and t not in three[1][:2])
    served, results = engine(eos_token_id=end), Results()
    served.add_request("a", text, params)
    while ("a", 1) not in results.reasons:
        step(served, results)
    assert served.requests["a"] and len(served.requests["a"]) == 2
    finish(served, results)
    assert results.reasons == {("a", 0): "length", ("a", 1): "stop", ("a", 2): "length"}
    assert results.tokens["a", 1] == three[1][: three[1].index(end) + 1]
    assert (results.tokens["a", 0], results.tokens["a", 2]) == (three[0], three[2])
