"""The prefix-aware policy against brute force, and one test for each trap that others fell into."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.balancing import BoundedHashing, NoTarget, Sticky
from minilib.serving.router.prefix_aware import BySession, PrefixAware, RoutingKey, SentPrefixes


def key(*blocks, session="", salt=""):
    """A prompt of these blocks, each of one token or of some text."""
    return RoutingKey(session, tuple(b.encode() if isinstance(b, str) else (b,) for b in blocks), salt)


def common_prefix(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.integers(1, 4), st.lists(st.tuples(PROMPTS, st.lists(st.integers(0, 9), min_size=4, max_size=4))))
@settings(max_examples=100)
def test_the_longest_match_within_the_bound_is_chosen(num_targets, requests):
    policy, sent = PrefixAware(gap=2, ratio=1.5, least_share=0.5), [[] for _ in range(num_targets)]
    for prompt, loads in requests:
        loads = loads[:num_targets]
        depths = [max((common_prefix(prompt, other) for other in there), default=0) for there in sent]
        within = [t for t in range(num_targets) if loads[t] - min(loads) <= 2 or loads[t] <= 1.5 * min(loads)]
        best = max(depths[t] for t in within)
        chosen = policy.choose(key(*prompt), loads)
        if best >= 0.5 * len(prompt):
            assert depths[chosen] == best and chosen in within
            assert loads[chosen] == min(loads[t] for t in within if depths[t] == best)
        else:
            assert loads[chosen] == min(loads)
        sent[chosen].append(prompt)
    assert policy.asked_blocks == sum(len(prompt) for prompt, _ in requests) >= policy.matched_blocks


@given(st.integers(1, 8), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=40))
def test_what_is_remembered_is_bounded_and_whole_from_the_first_block_on(max_blocks, prompts):
    held = SentPrefixes(max_blocks)
    for prompt in prompts:
        held.sent(0, key(*prompt))
        held.check_invariants()
        assert held.depths(key(*prompt), 2) == [min(len(prompt), max_blocks), 0], "the newest is held"
        assert held.depths(key(9, *prompt), 1) == [0]
    for prompt in prompts:  # what is held is found: no block without those before it
        deep = held.depths(key(*prompt), 1)[0]
        assert not set(key(*prompt).names[deep:]) & set(held._held[0])


def test_the_prompt_used_longest_ago_is_forgotten_first():
    held = SentPrefixes(4)
    for prompt in ((1, 2), (3, 4), (1, 2), (5,)):
        held.sent(0, key(*prompt))
    assert [held.depths(key(*prompt), 1) for prompt in ((1, 2), (3, 4), (5,))] == [[2], [1], [1]]


def test_a_busy_replica_whose_prompts_were_unique_attracts_no_misses():
    """The smallest tree is no sign of room: it is that of whoever computes long prompts that nobody else has."""
    policy = PrefixAware()
    for turn in range(50):  # replica 0 holds much, and replica 1 little and is stuck
        policy.held.sent(0, key("system", turn))
    assert [policy.choose(key("new", n), [0, 9]) for n in range(20)] == [0] * 20


def test_misses_spread_over_idle_replicas():
    policy = PrefixAware()
    assert sorted(policy.choose(key(n), [0, 0, 0, 0]) for n in range(40)) == [n for n in range(4) for _ in range(10)]


def test_equal_matches_spread_over_equal_loads():
    policy = PrefixAware()
    for target in range(3):
        policy.held.sent(target, key("system"))
    assert sorted(policy.choose(key("system", n), [1, 1, 1]) for n in range(9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "loads, stays",
    [
        ([5, 1], True),  # five times as much, and a difference of 4: nothing
        ([6, 1], False),
        ([105, 100], True),  # a difference of 5, and hardly more: nothing
        ([150, 100], True),
        ([151, 100], False),
    ],
)
def test_imbalance_needs_a_difference_and_a_ratio(loads, stays):
    policy = PrefixAware(gap=4, ratio=1.5)
    policy.held.sent(0, key("a", "b"))
    assert (policy.choose(key("a", "b"), loads) == 0) == stays


def test_an_overloaded_replica_loses_to_the_longest_match_among_the_others():
    policy = PrefixAware(gap=2)
    for target, depth in ((0, 4), (2, 2)):
        policy.held.sent(target, key(*"abcd"[:depth]))
    assert policy.choose(key(*"abcd"), [9, 0, 2]) == 2, "2 has half of it, 1 has nothing and is idle"


def test_a_beginning_that_all_prompts_share_attracts_nobody():
    policy = PrefixAware(least_share=0.25)
    targets = [policy.choose(key("you are", *range(n * 9, n * 9 + 7)), [0, 0, 0, 0]) for n in range(12)]
    assert targets == [0, 1, 2, 3] * 3
    assert PrefixAware(least_share=0.01).choose(key("x"), [0, 0]) == 0


def test_one_hot_prompt_is_held_by_all_before_one_replica_is_swamped():
    policy, loads = PrefixAware(gap=4, ratio=1.5), [0, 0, 0, 0]
    for number in range(40):  # nothing ends
        loads[policy.choose(key("hot", "hot", number), loads)] += 1
    assert max(loads) <= max(min(loads) + 5, 1.5 * min(loads) + 1), loads
    assert policy.held.depths(key("hot", "hot"), 4) == [2, 2, 2, 2]


@pytest.mark.parametrize("num_routers", [1, 2, 4])
def test_routers_that_each_see_their_share_keep_the_bound_together(num_routers):
    """Each of n routers sees 1/n of a load, so that n bounds of `gap` would be one of n · gap."""

    def difference(told: int) -> int:
        routers = [PrefixAware(gap=8, ratio=1.0, num_routers=told) for _ in range(num_routers)]
        seen = [[0, 0] for _ in routers]
        for number in range(80):
            turn = number % num_routers
            policy, loads = routers[turn], seen[turn]
            policy.held.forget(1)
            policy.held.sent(0, key("hot"))
            loads[policy.choose(key("hot"), loads)] += 1
        return sum(loads[0] for loads in seen) - sum(loads[1] for loads in seen)

    assert difference(told=num_routers) <= 8 + num_routers
    assert difference(told=1) >= 8 * num_routers


def test_a_salt_is_part_of_the_key():
    policy = PrefixAware()
    policy.held.sent(1, key("a", "b", salt="tenant 1"))
    assert policy.choose(key("a", "b", salt="tenant 1"), [1, 1]) == 1
    assert policy.held.depths(key("a", "b"), 2) == policy.held.depths(key("a", "b", salt="tenant 2"), 2) == [0, 0]


def test_a_replica_that_restarted_holds_nothing_and_one_that_is_down_is_not_chosen():
    policy = PrefixAware()
    policy.held.sent(1, key("a"))
    assert policy.choose(key("a"), [0, 0, 0]) == 1
    assert policy.choose(key("a"), [0, math.inf, 0]) != 1
    policy.forget(1)
    assert policy.held.depths(key("a"), 3)[1] == 0
    with pytest.raises(NoTarget):
        policy.choose(key("a"), [math.inf] * 3)


def test_a_replica_that_refused_a_request_does_not_attract_what_follows_it():
    policy, refused = PrefixAware(), key("system", "a", "b")
    policy.held.sent(1, key("system", "z"))
    policy.held.sent(1, refused)
    policy.withdraw(1, refused)
    assert policy.held.depths(refused, 2) == [0, 1], "what others had brought there stays"
    policy.held.sent(1, refused)
    policy.withdraw(1, key("system", "a", "b"))
    assert policy.held.depths(refused, 2) == [0, 3], "an equal request is another one"
    policy.held.check_invariants()


def test_text_is_cut_into_blocks_of_bytes():
    assert RoutingKey.of_text("ab" * 3, size=4).blocks == (b"abab",)
    assert RoutingKey.of_text("é" * 4, size=2).blocks == ("é".encode(),) * 4
    assert RoutingKey.of_text("", size=4).blocks == RoutingKey.of_text("\ud800", size=4).blocks == ()
    assert RoutingKey.of_tokens([1, 2, 3, 4, 5], size=2).blocks == ((1, 2), (3, 4))
    names = RoutingKey.of_text("ab" * 8, size=4).names
    assert len(set(names)) == 4, "equal blocks behind different ones have different names"
    assert RoutingKey.of_text("abababab", size=4).names == names[:2]


@pytest.mark.parametrize("make", [Sticky, BoundedHashing])
def test_a_session_stays_while_its_replica_is_there_and_others_come(make):
    policy = BySession(make)
    homes = [policy.choose(key(n, session=f"s{n}"), [0, 0, 0]) for n in range(60)]
    assert homes == [policy.choose(key(session=f"s{n}"), [0, 0, 0]) for n in range(60)]
    moved = [policy.choose(key(session=f"s{n}"), [0, 0, 0, 0]) for n in range(60)]
    assert all(new in (old, 3) for old, new in zip(homes, moved, strict=True)) and 3 in moved
    assert [policy.choose(key(n), [0, 0, 0]) for n in range(3)] == [0, 1, 2], "nobody's turns spread"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PrefixAware(least_share=0),
        lambda: PrefixAware(gap=-1),
        lambda: PrefixAware(ratio=0.9),
        lambda: PrefixAware(gap=math.nan),
        lambda: PrefixAware(num_routers=0),
        lambda: PrefixAware(max_blocks=0),
        lambda: RoutingKey.of_text("a", size=0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        wrong()
