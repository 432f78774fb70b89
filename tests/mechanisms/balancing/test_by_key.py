"""Policies by key against what they promise; what every policy promises is in test_policies.py."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.balancing import BoundedHashing, Sticky, assign, hash_affinity


@given(
    st.integers(1, 8),
    st.floats(1.01, 3),
    st.lists(st.integers(0, 5), max_size=60),
    st.sets(st.integers(0, 7), max_size=3),
)
@settings(max_examples=40)
def test_hashing_never_exceeds_its_bound(num_targets, c, keys, down):
    policy = BoundedHashing(num_targets, c, virtual_nodes=4)
    loads = [math.inf if target in down else 0 for target in range(num_targets)]
    up = [target for target in range(num_targets) if target not in down]
    for number, key in enumerate(keys if up else (), 1):
        bound = math.ceil(c * number / len(up))
        chosen = policy.choose(key, loads)
        # the first of the ring's that has room; a walk along the ring is in test_sharding.py
        assert chosen == next(t for t in policy.ring.successors(key) if t in up and loads[t] < bound)
        loads[chosen] += 1
        assert max(loads[target] for target in up) <= bound


def test_hashing_with_a_bound_keeps_a_key_where_it_is_while_there_is_room():
    policy = BoundedHashing(4)
    for key in range(50):
        assert policy.choose(key, [7, 7, 7, 7]) == policy.ring.owner(key)
    hot = assign(BoundedHashing(4), ["hot"] * 1000, 4)
    assert sorted(hot) == [62, 312, 313, 313], "one hot key fills three up to ⌈1.25 · mean⌉ = 313"
    assert sorted(assign(Sticky(4), ["hot"] * 1000, 4)) == [0, 0, 0, 1000]


def test_affinities_are_the_same_for_ever_and_look_random():
    assert hash_affinity(2)("k0") == (0.0473811837035133, 0.7587741756009613)
    rows = np.array([hash_affinity(8)(key) for key in range(2000)])
    assert rows.min() >= 0 and rows.max() < 1
    assert abs(rows.mean() - 0.5) < 0.01 and np.abs(np.corrcoef(rows.T) - np.eye(8)).max() < 0.1
    assert len({hash_affinity(1)(key) for key in (1, "1", b"1")}) == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        hash_affinity(0)


def test_a_sticky_key_moves_only_if_its_target_is_down():
    policy = Sticky(5)
    for key in range(100):
        home = policy.choose(key, [0] * 5)
        assert home == max(range(5), key=hash_affinity(5)(key).__getitem__) == policy.choose(key, [99] * 5)
        for down in range(5):
            moved = policy.choose(key, [math.inf if target == down else 0 for target in range(5)])
            assert (moved == home) == (down != home), "rendezvous hashing moves what it must"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: BoundedHashing(3, c=1), "c must be above 1"),
        (lambda: BoundedHashing(0), "one shard or more"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
