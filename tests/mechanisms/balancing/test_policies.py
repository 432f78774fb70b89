"""Policies against what they promise, against brute force, and against each other."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.balancing import (
    BoundedHashing,
    Feedback,
    LeastLoaded,
    NoTarget,
    Random,
    RoundRobin,
    Sticky,
    TwoChoices,
    Weighted,
    assign,
    hash_affinity,
)
from minilib.numbers.load_metrics import max_over_mean

POLICIES = {
    "round robin": lambda n: RoundRobin(),
    "random": lambda n: Random(0),
    "least loaded": lambda n: LeastLoaded(),
    "two choices": lambda n: TwoChoices(0),
    "three choices": lambda n: TwoChoices(0, d=3),
    "weighted": lambda n: Weighted([1 + target % 3 for target in range(n)]),
    "bounded hashing": lambda n: BoundedHashing(n, virtual_nodes=4),
    "sticky": lambda n: Sticky(n),
    "feedback": lambda n: Feedback(n, rate=0.1, affinity=hash_affinity(n)),
}
SIZED = ["weighted", "bounded hashing", "sticky", "feedback"]
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
LOADS = st.lists(st.integers(0, 9) | st.just(math.inf), min_size=1, max_size=8)


def check(policy):
    if hasattr(policy, "check_invariants"):
        policy.check_invariants()


@every_policy
def test_whoever_is_down_is_never_chosen(make):
    @given(LOADS, st.integers(0, 99))
    @settings(max_examples=40)
    def check_loads(loads, key):
        policy = make(len(loads))
        for step in range(3 * len(loads)):
            if min(loads) == math.inf:
                with pytest.raises(NoTarget, match=f"0 of {len(loads)} targets are up, it takes 1"):
                    policy.choose(f"k{key}", loads)
            else:
                assert loads[policy.choose(f"k{key + step}", loads)] < math.inf
            policy.observe(loads)
            check(policy)

    check_loads()


@every_policy
def test_of_one_target_that_one(make):
    assert assign(make(1), [f"k{number}" for number in range(20)], 1, window=3) == [20]


@every_policy
def test_the_same_policy_decides_the_same(make):
    keys = [f"k{number % 17}" for number in range(300)]
    assert assign(make(5), keys, 5, window=10) == assign(make(5), keys, 5, window=10)


@pytest.mark.parametrize("name", SIZED)
def test_another_number_of_targets_is_refused(name):
    with pytest.raises(ValueError, match="made for 3 targets, got the loads of 2"):
        POLICIES[name](3).choose("k", [0, 0])


def test_round_robin_takes_turns_and_skips():
    policy = RoundRobin()
    assert [policy.choose(None, [9, 0, 5]) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [policy.choose(None, [0, 0, math.inf]) for _ in range(3)] == [0, 1, 0]
    assert policy.choose(None, [0]) == 0, "with fewer targets than it had"


def test_random_is_even_and_of_its_seed():
    counts = assign(Random(3), range(8000), 8)
    assert sum(counts) == 8000 and max_over_mean(counts) < 1.1
    assert counts == assign(Random(3), range(8000), 8) != assign(Random(4), range(8000), 8)


@given(LOADS)
@settings(max_examples=40)
def test_least_loaded_is_undercut_by_nobody(loads):
    policy = LeastLoaded()
    if min(loads) < math.inf:
        assert loads[policy.choose(None, loads)] == min(loads)


def test_least_loaded_takes_turns_among_equals():
    policy = LeastLoaded()
    assert [policy.choose(None, [0, 0, 0]) for _ in range(4)] == [0, 1, 2, 0]
    assert [policy.choose(None, [1, 0, 0]) for _ in range(3)] == [1, 2, 1]
    assert max(counts := assign(LeastLoaded(), range(103), 10)) - min(counts) == 1


@given(LOADS, st.integers(0, 5))
@settings(max_examples=40)
def test_d_choices_avoid_the_d_minus_1_most_loaded(loads, seed):
    up = sorted(load for load in loads if load < math.inf)
    for d in range(1, len(loads) + 2):
        if up:
            chosen = loads[TwoChoices(seed, d).choose(None, loads)]
            assert chosen <= up[max(0, len(up) - d)], "d different ones, the best of them"
    if up:
        assert chosen == up[0], "who looks at all finds the best"


def test_two_choices_looks_at_every_pair_equally_often():
    policy, loads = TwoChoices(1), [0, 1, 2, 3]
    counts = Counter(policy.choose(None, loads) for _ in range(6000))
    assert [round(counts[target] / 1000) for target in range(4)] == [3, 2, 1, 0], "of 6 pairs"


def test_nginx_documents_this_order():
    policy = Weighted([5, 1, 1])
    assert [policy.choose(None, [0, 0, 0]) for _ in range(7)] == [0, 0, 1, 0, 2, 0, 0]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
@settings(max_examples=40)
def test_a_cycle_of_weights_is_exact_and_smooth(weights):
    policy, counts = Weighted(weights), [0] * len(weights)
    for step in range(1, 3 * sum(weights) + 1):
        counts[policy.choose(None, counts)] += 1
        policy.check_invariants()
        if step % sum(weights) == 0:
            assert counts == [weight * step // sum(weights) for weight in weights]
        for count, weight in zip(counts, weights, strict=True):  # never far behind, never far ahead
            assert abs(count - Fraction(step * weight, sum(weights))) < len(weights)


def test_weights_of_those_that_are_up_count():
    policy = Weighted([3, 1, 2])
    policy.choose(None, [0, 0, 0])
    counts = Counter(policy.choose(None, [0, math.inf, 0]) for _ in range(50))
    assert counts == {0: 30, 2: 20}
    policy.check_invariants()


ROWS = st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=6)


@given(ROWS, st.data())
@settings(max_examples=40)
def test_the_largest_sums_win_and_the_first_of_equals(scores, data):
    n = len(scores)
    bias = data.draw(st.lists(st.integers(-2, 2).map(float), min_size=n, max_size=n))
    down = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    loads = [math.inf if target in down else 0 for target in range(n)]
    policy = Feedback(bias, rate=0.1)
    best = sorted((-(scores[t] + bias[t]), t) for t in range(n) if t not in down)
    for k in range(1, len(best) + 1):
        assert policy.choose_many(scores, loads, k) == [target for _, target in best[:k]]
    assert policy.choose(scores, loads) == best[0][1]
    with pytest.raises(NoTarget, match=f"{len(best)} of {n} targets are up, it takes {len(best) + 1}"):
        policy.choose_many(scores, loads, len(best) + 1)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), st.sampled_from(["sign", "proportional"]))
@settings(max_examples=40)
def test_a_window_moves_the_biases_as_published(counts, rule):
    policy, mean = Feedback(len(counts), rate=0.001, rule=rule), Fraction(sum(counts), len(counts))
    policy.observe(counts)
    policy.check_invariants()
    for bias, count in zip(policy.bias, counts, strict=True):
        if rule == "sign":
            assert bias == 0.001 * ((mean > count) - (mean < count)), "to the bit"
        else:
            assert bias == pytest.approx(float((mean - count) / mean) * 0.001 if mean else 0, rel=1e-12)
    for array in (np.array(counts), np.array(counts, dtype=np.float64)):
        other = Feedback([0.0] * len(counts), rate=0.001, rule=rule)
        other.observe(array)
        assert other.bias == policy.bias and {type(bias) for bias in other.bias} == {float}


def test_small_integers_do_not_overflow():
    policy = Feedback(4, rate=1.0)
    policy.observe(np.array([200, 100, 100, 0], dtype=np.uint8))
    assert policy.bias == [-1, 0, 0, 1]


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_nothing_moves_without_load_and_who_is_down_stays(rule):
    policy = Feedback([0.5, -0.25, 0.0], rate=0.1, rule=rule)
    policy.observe([0, 0, 0])
    policy.observe([7, 7, 7])
    policy.observe([math.inf] * 3)
    assert policy.bias == [0.5, -0.25, 0.0]
    policy.observe([6, math.inf, 2])
    assert policy.bias == pytest.approx([0.4, -0.25, 0.1] if rule == "sign" else [0.45, -0.25, 0.05])


@pytest.mark.parametrize("rule, rate", [("sign", 0.01), ("proportional", 0.02)])
def test_feedback_evens_out_a_skewed_router(rule, rate):
    rng = np.random.default_rng(0)
    tokens = (rng.random((6400, 8)) + np.linspace(0, 0.5, 8)).tolist()
    feedback = Feedback(8, rate, rule)
    assign(feedback, tokens, 8, window=64)
    learned = Feedback(feedback.bias, rate=0)
    assert max_over_mean(assign(Feedback(8, rate=0), tokens, 8)) > 2
    assert max_over_mean(assign(learned, tokens, 8)) < 1.2


def test_windows_are_whole_and_what_is_left_is_not_observed():
    class Listener(RoundRobin):
        def __init__(self):
            super().__init__()
            self.heard = []

        def observe(self, loads):
            self.heard.append(list(loads))

    policy = Listener()
    assert assign(policy, range(11), 3, window=4) == [4, 4, 3]
    assert policy.heard == [[2, 1, 1], [1, 2, 1]]
    policy = Listener()
    assert assign(policy, range(11), 3) == [4, 4, 3] and not policy.heard
    assert assign(policy, [], 3, window=1) == [0, 0, 0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: TwoChoices(0, d=0), "d must be at least 1 target, got 0"),
        (lambda: Weighted([]), "one a target"),
        (lambda: Weighted([1, 0]), "above 0"),
        (lambda: Weighted([1, math.inf]), "finite"),
        (lambda: Feedback(0, rate=0.1), "how many targets there are; got 0"),
        (lambda: Feedback([math.nan], rate=0.1), "one finite number a target"),
        (lambda: Feedback(2, rate=-1), "rate finite and not negative"),
        (lambda: Feedback(2, rate=1, rule="pid"), "one of .*proportional.*got 'pid'"),
        (lambda: Feedback(2, rate=1).choose([1.0], [0, 0]), "one score for each of 2 targets, got 1"),
        (lambda: Feedback(2, rate=1).choose_many([1.0, 2.0], [0, 0], 0), "k must be at least 1"),
        (lambda: Feedback(2, rate=1).observe([1]), "made for 2 targets, got the loads of 1"),
        (lambda: assign(RoundRobin(), [], 1, window=0), "1 key or more, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
