"""Hits: LRU against functools.lru_cache, the optimum against every choice that could be made, and a Zipf trace."""

import random
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.http.experiment import zipf_keys
from minilib.mechanisms.caching import Cache, Lru, belady_hits, count_hits
from tests.mechanisms.caching.naive import POLICIES

BELADY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


@given(trace=st.lists(st.integers(0, 20)), capacity=st.integers(0, 12))
def test_lru_hits_as_functools_does(trace, capacity):
    remembered = lru_cache(capacity)(lambda key: True)
    for key in trace:
        remembered(key)
    cache = Cache(capacity, Lru())
    assert count_hits(trace, cache) == cache.hits == remembered.cache_info().hits
    assert cache.misses == remembered.cache_info().misses and len(cache) == remembered.cache_info().currsize


def most_hits(trace, capacity, held=frozenset()):
    """Try every victim at every miss."""
    if not trace:
        return 0
    key, rest = trace[0], trace[1:]
    if key in held:
        return 1 + most_hits(rest, capacity, held)
    if len(held) < capacity:
        return most_hits(rest, capacity, held | {key})
    return max((most_hits(rest, capacity, held - {victim} | {key}) for victim in held), default=0)


@given(trace=st.lists(st.integers(0, 4), max_size=12), capacity=st.integers(0, 4))
@settings(max_examples=300)
def test_the_optimum_is_the_best_of_all_choices(trace, capacity):
    assert belady_hits(trace, capacity) == most_hits(tuple(trace), capacity)


@pytest.mark.parametrize("name", POLICIES)
@given(trace=st.lists(st.integers(0, 9), max_size=80), capacity=st.integers(0, 10))
def test_no_policy_has_more_hits_than_the_optimum(name, trace, capacity):
    hits = count_hits(trace, Cache(capacity, POLICIES[name][0]()))
    assert hits <= belady_hits(trace, capacity) <= len(trace) - len(set(trace))
    if capacity >= len(set(trace)):
        assert hits == belady_hits(trace, capacity) == len(trace) - len(set(trace))
    if capacity < 2:
        assert (
            hits
            == belady_hits(trace, capacity)
            == capacity * sum(one == other for one, other in zip(trace, trace[1:], strict=False))
        )


def test_the_optimum_of_belady_s_string():
    assert [belady_hits(BELADY, capacity) for capacity in range(6)] == [0, 0, 3, 5, 6, 7]
    assert [count_hits(BELADY, Cache(capacity, POLICIES["fifo"][0]())) for capacity in (3, 4)] == [3, 2]
    with pytest.raises(ValueError, match="0 or more, got -1"):
        belady_hits(BELADY, -1)
    assert belady_hits(iter("abab"), 2) == belady_hits([None, "a", None, "a"], 2) == 2


def test_hits_on_a_zipf_trace():
    """20,000 requests for 1,000 keys, room for 100."""
    trace = zipf_keys(20_000, 1_000)
    hits = {name: count_hits(trace, Cache(100, policy())) for name, (policy, _) in POLICIES.items()}
    assert hits == {"fifo": 10390, "lru": 11486, "clock": 11743, "lfu": 12626, "sieve": 13112, "s3fifo": 13030}
    assert belady_hits(trace, 100) == 15000
    assert max(hits.values()) > 0.85 * 15000


def test_hits_when_scans_come_between():
    """The same requests, and after every 500 a scan of 200 keys that come once."""
    requests, trace = zipf_keys(20_000, 1_000), []
    for begin in range(0, len(requests), 500):
        trace += requests[begin : begin + 500] + [(begin, number) for number in range(200)]
    hits = {name: count_hits(trace, Cache(100, policy())) for name, (policy, _) in POLICIES.items()}
    assert hits == {"fifo": 9792, "lru": 10540, "clock": 10662, "lfu": 11830, "sieve": 13119, "s3fifo": 13110}
    assert belady_hits(trace, 100) == 15000, "one place of 100 is enough for all that comes once"


def test_a_value_of_a_trace_may_be_any_key():
    rng = random.Random(0)
    trace = [rng.choice([None, 0, False, "", ()]) for _ in range(50)]
    assert count_hits(trace, Cache(5, Lru())) == 50 - len(set(trace))
