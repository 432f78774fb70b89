"""Eviction policies against the same policies written another way, and what all of them promise about pinned keys."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.caching import Cache, Clock, Fifo, Lfu, Lru, NothingToEvict, S3Fifo, Sieve, count_hits
from tests.mechanisms.caching.naive import POLICIES

# Keys that may not leave change nothing for the others. S3-FIFO alone counts them: its shares are those of all keys.
INDIFFERENT = [name for name in POLICIES if name != "s3fifo"]


def victims(policy, references, room):
    """The victim of each miss in a cache, None while there is room."""
    cache, seen = Cache(room, policy), []
    for key in references:
        if cache.get(key) is None:
            seen.append(next(iter(cache.put(key, True)), None))
        cache.check_invariants()
    return seen


def evict(policy, *allowed):
    key = policy.victim(*allowed)
    policy.evict(key)
    policy.check_invariants()
    return key


@pytest.mark.parametrize("name", POLICIES)
@given(references=st.lists(st.integers(0, 15), max_size=120), room=st.integers(1, 12))
@settings(max_examples=300)
def test_the_same_victims_as_written_another_way(name, references, room):
    policy, naive = POLICIES[name]
    assert victims(policy(), references, room) == naive(references, room)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_victims_on_long_traces(name):
    """Working sets that move, and skewed keys, with room for one small share of S3-FIFO and for several."""
    policy, naive = POLICIES[name]
    for seed in range(4):
        rng = random.Random(seed)
        moving = [rng.randrange(12) + 6 * (time // 100) for time in range(800)]
        skewed = [min(int(rng.paretovariate(0.7)), 99) for _ in range(800)]
        for room in (1, 2, 9, 10, 31):
            for references in (moving, skewed):
                assert victims(policy(), references, room) == naive(references, room)


def test_each_policy_has_its_own_victims():
    first = {}
    for name, (policy, _) in POLICIES.items():
        policy = policy()
        for key in "abcd":
            policy.add(key)
        for key in "abbba":
            policy.use(key)
        first[name] = "".join(evict(policy) for _ in range(4))
    assert first == {"fifo": "abcd", "lru": "cdba", "clock": "cdab", "lfu": "cdab", "sieve": "cdab", "s3fifo": "cdab"}


def test_a_clock_whose_keys_were_all_used_is_first_come_first_gone():
    clock = Clock()
    for key in range(4):
        clock.add(key)
        clock.use(key)
    assert [evict(clock) for _ in range(4)] == [0, 1, 2, 3]


def test_a_counter_survives_as_many_turns_as_it_has_uses_at_most():
    clock = Clock(max_uses=3)
    clock.add("hot")
    for _ in range(5):
        clock.use("hot")
    left = []
    for key in range(8):
        clock.add(key)
        left.append(evict(clock))
    assert left == [0, 1, 2, "hot", 3, 4, 5, 6]
    with pytest.raises(ValueError, match="1 at least, got 0"):
        Clock(0)


def test_sieve_by_hand():
    """Room for 4. The hand keeps a and c where they are, and new keys do not come between it and what it kept."""
    assert victims(Sieve(), "abcdacefghij", 4) == [None] * 4 + ["b", "d", "e", "f", "g", "h"]
    assert victims(Clock(), "abcdacefghij", 4) == [None] * 4 + ["b", "d", "a", "e", "c", "f"]
    # all used: the hand comes round to the oldest, and goes on from there to the newest
    assert victims(Sieve(), "abcabcdefg", 3) == [None] * 3 + ["a", "b", "c", "d"]


def test_s3fifo_by_hand():
    """Room for 10, so one new key is the share: b is used twice and stays, a comes back in time and stays."""
    policy = S3Fifo()
    references = [*"abcdefghij", *"bb", "k", "l", "m", "a", *"nopqrstu"]
    left = victims(policy, references, 10)
    assert left[:10] == [None] * 10
    assert "".join(left[10:]) == "acdefghijklm"
    assert set(policy) == set("banopqrstu") and set(policy._main) == {"b", "a"}
    assert list(policy._ghosts) == list("efghijklm")


def test_s3fifo_remembers_what_it_evicted_and_not_what_its_owner_removed():
    kept = []
    for leave in (S3Fifo.evict, S3Fifo.remove):
        policy = S3Fifo()
        policy.add("x")
        leave(policy, "x")
        policy.add("x")
        kept.append("x" in set(policy._main))
        policy.check_invariants()
    assert kept == [True, False]


def test_lfu_forgets_what_was_hot_long_ago():
    """A key used 20 times leaves once the victims have aged the cache as far; without aging it would stay for ever."""
    policy = Lfu()
    policy.add("hot")
    for _ in range(19):
        policy.use("hot")
    for key in range(100):
        policy.add(key)
        if evict(policy) == "hot":
            break
    assert policy.age == 20 and key == 19


SCAN = [*range(8)] * 3 + [*range(100, 150)] + [*range(8)] * 3


def test_a_scan_through_a_hot_set():
    """8 hot keys in a cache of 10, then 50 keys that pass once: 40 of the 48 requests for hot keys can hit.

    LFU is no help: two of the 50 age the cache by one use, so three uses are soon outlived. Had
    they been 30, all would last.
    """
    hits = {name: count_hits(SCAN, Cache(10, policy())) for name, (policy, _) in POLICIES.items()}
    assert hits == {"fifo": 32, "lru": 32, "clock": 32, "lfu": 32, "sieve": 40, "s3fifo": 40}
    hot = [*range(8)] * 30 + SCAN[24:]
    assert count_hits(hot, Cache(10, Lfu())) - count_hits(hot, Cache(10, Lru())) == 8


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data(), pinned=st.sets(st.integers(0, 11)), uses=st.lists(st.integers(0, 11), max_size=60))
def test_no_policy_evicts_a_key_that_may_not_leave(name, data, pinned, uses):
    """Whatever it did before, it finds every other key, each once, and then says that there is none."""
    policy = POLICIES[name][0]()
    for key in range(12):
        policy.add(key)
    for key in uses:
        policy.use(key)
        if data.draw(st.booleans()):
            policy.victim()  # chosen, and then kept after all
        policy.check_invariants()
    left = {evict(policy, lambda key: key not in pinned) for _ in range(12 - len(pinned))}
    assert left == set(range(12)) - pinned and set(policy) == pinned
    before = sorted(policy)
    with pytest.raises(NothingToEvict, match=f"none of the {len(pinned)} keys"):
        policy.victim(lambda key: key not in pinned)
    assert sorted(policy) == before
    assert {evict(policy) for _ in pinned} == pinned


@pytest.mark.parametrize("name", INDIFFERENT)
@given(used=st.lists(st.integers(0, 5)), pinned=st.sets(st.integers(0, 5)))
def test_without_those_that_may_not_leave_the_order_is_that_of_the_others(name, used, pinned):
    policy, others = POLICIES[name][0](), POLICIES[name][0]()
    for key in range(6):
        policy.add(key)
        if key not in pinned:
            others.add(key)
    for key in used:
        policy.use(key)
        if key not in pinned:
            others.use(key)
    for _ in range(len(others)):
        assert evict(policy, lambda key: key not in pinned) == evict(others)


def test_leaves_leave_before_what_they_continue():
    """A prefix tree: a, a/b, a/b/c and a/d. Only leaves may go, and the used path is used leaf first."""
    for policy, _ in POLICIES.values():
        policy, tree = policy(), {"a": "", "ab": "a", "abc": "ab", "ad": "a"}
        for node in tree:
            policy.add(node)
        for node in ("ad", "a"):
            policy.use(node)
        order = []
        while tree:
            order.append(evict(policy, lambda node, tree=tree: node not in tree.values()))
            del tree[order[-1]]
        assert order.index("abc") < order.index("ab") < order.index("a") == 3 and "ad" in order


@pytest.mark.parametrize("name", POLICIES)
def test_keys_of_any_kind(name):
    policy = POLICIES[name][0]()
    for key in (None, 0, "", (), frozenset()):
        policy.add(key)
    assert {evict(policy) for _ in range(5)} == {None, 0, "", (), frozenset()}
    assert len(policy) == 0
    for leave in (policy.remove, policy.evict):
        with pytest.raises(KeyError):
            leave("never held")
    with pytest.raises(NothingToEvict, match="none of the 0 keys"):
        policy.victim()


@pytest.mark.parametrize("name", POLICIES)
def test_a_key_is_added_once_and_used_only_while_it_is_held(name):
    policy = POLICIES[name][0]()
    policy.add("a")
    with pytest.raises(AssertionError, match="'a' was added twice"):
        policy.add("a")
    with pytest.raises((AssertionError, KeyError)):
        policy.use("b")
    assert list(policy) == ["a"]


def test_invariants_see_every_kind_of_damage():
    def damaged(policy, damage):
        for key in range(12):
            policy.add(key)
            policy.use(key)
        evict(policy)
        damage(policy)
        with pytest.raises(AssertionError):
            policy.check_invariants()

    damaged(Clock(), lambda policy: policy._queue.update({5: 2}))
    damaged(Clock(), lambda policy: policy._queue.update({5: -1}))
    damaged(Lfu(), lambda policy: policy._priority.update({5: 9}))
    damaged(Lfu(), lambda policy: policy._uses.pop(5))
    damaged(Lfu(), lambda policy: policy._uses.update({5: 99}))
    damaged(Lfu(), lambda policy: policy._ranks.setdefault(2, {}).pop(5))
    damaged(Sieve(), lambda policy: (policy._ahead.update({5: True}), policy._behind.update({5: True})))
    damaged(S3Fifo(), lambda policy: policy._main.add(next(iter(policy._small))))
    damaged(S3Fifo(), lambda policy: policy._ghosts.update({5: None}))
    damaged(S3Fifo(), lambda policy: policy._small.update({5: 4}))


@pytest.mark.parametrize("policy", [Fifo, Clock, Sieve, S3Fifo, Lru, Lfu])
def test_a_key_that_is_renewed_is_recent_and_was_not_used(policy):
    """Where a use decides, a renewed key leaves as one that nobody used; where the last time decides, as one used."""
    held = policy()
    for key in "abc":
        held.add(key)
    held.renew("a")
    left = []
    while len(held):
        left.append(held.victim())
        held.evict(left[-1])
        held.check_invariants()
    assert "".join(left) == ("bca" if policy in (Lru, Lfu) else "abc")
