"""Partitioners against brute force: a scan over boundaries, a walk along the ring, shares counted one by one."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.sharding import (
    ConsistentHashPartitioner,
    HashPartitioner,
    RangePartitioner,
    UnusableKey,
    imbalance,
    loads,
    stable_hash,
)
from minilib.mechanisms.sharding.slicing import slices

KEYS = st.one_of(st.integers(), st.text(), st.binary())
RING_LENGTH = 2**64
ONE_RANGE = RangePartitioner(())
GOLDEN = [10014444783217908748, 13847270365563136365, 10931555492504628875, 7260585440537559151]


def test_the_hash_is_the_same_for_ever():
    """Were it to change, every database that was sharded by it would have to move."""
    assert [stable_hash(key) for key in (0, -1, "user:7", b"user:7")] == GOLDEN
    assert len({stable_hash(key) for key in (1, "1", b"1", b"\x01", "", b"")}) == 6
    assert stable_hash(True) == stable_hash(1), "equal keys are one key"
    assert stable_hash(2**20000) != stable_hash(2**20000 + 1)
    assert stable_hash("\ud800") >= 0


def test_the_hash_is_not_salted_by_the_process():
    import subprocess
    import sys

    code = "from minilib.mechanisms.sharding import stable_hash; print(stable_hash('user:7'))"
    printed = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, timeout=60)
        for seed in ("1", "2")
    ]
    assert [int(run.stdout) for run in printed] == [stable_hash("user:7")] * 2


@pytest.mark.parametrize("key", [1.0, None, (1,), np.int64(1)])
def test_a_key_of_another_type_is_refused(key):
    for partitioner in (HashPartitioner(2), ConsistentHashPartitioner((0, 1)), RangePartitioner((5,)), ONE_RANGE):
        with pytest.raises(UnusableKey, match="int, str or bytes, got .* of type"):
            partitioner.owner(key)


@given(KEYS, st.integers(1, 20))
def test_a_hash_has_one_owner_and_only_one_shard_owns_all(key, num_shards):
    partitioner = HashPartitioner(num_shards)
    assert partitioner.owner(key) == stable_hash(key) % num_shards
    assert partitioner.owner(key) in partitioner.shards
    assert HashPartitioner(1).owner(key) == 0


@pytest.mark.parametrize("element", [st.integers(), st.text(), st.binary()])
def test_a_range_is_found_by_scanning_the_boundaries(element):
    @given(st.lists(element), element)
    def check(boundaries, key):
        partitioner = RangePartitioner(tuple(sorted(boundaries)))
        assert partitioner.owner(key) == sum(boundary <= key for boundary in boundaries)
        for boundary in boundaries:  # a boundary itself belongs to the right
            assert partitioner.owner(boundary) == sum(other <= boundary for other in boundaries)
        assert partitioner.num_shards == len(partitioner.shards) == len(boundaries) + 1

    check()


@pytest.mark.parametrize("num_keys", [0, 1, 2, 3, 4, 5, 12, 17])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_even_ranges(num_keys, num_shards, padded):
    partitioner = RangePartitioner.even(num_keys, num_shards, padded=padded)
    owners = [partitioner.owner(key) for key in range(num_keys)]
    assert partitioner.num_shards == num_shards
    assert owners == sorted(owners)
    sizes = list(loads(partitioner, range(num_keys)).values())
    assert sizes == sorted(sizes, reverse=True)
    if padded:
        cut = slices(num_keys, num_shards)
        assert owners == [next(s for s, (start, stop) in enumerate(cut) if start <= k < stop) for k in range(num_keys)]
    else:
        assert max(sizes) - min(sizes) <= 1
    for shard in partitioner.shards:
        assert list(range(num_keys))[partitioner.span(shard)] == [k for k in range(num_keys) if owners[k] == shard]


def test_ranges_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="ascend"):
        RangePartitioner((2, 1))
    with pytest.raises(UnusableKey, match=r"\['int', 'str'\]"):
        RangePartitioner((1, "a"))
    with pytest.raises(UnusableKey, match="type int, and 'a' cannot"):
        RangePartitioner((1,)).owner("a")
    for shard in (-1, 2):
        with pytest.raises(IndexError, match=f"shard {shard} is none of the 2"):
            RangePartitioner((1,)).span(shard)
    for num_keys, num_shards in ((-1, 2), (1, 0)):
        with pytest.raises(ValueError, match=f"got {num_keys} and {num_shards}"):
            RangePartitioner.even(num_keys, num_shards)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        HashPartitioner(0)


@given(KEYS, st.sets(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 5))
def test_a_ring_is_walked_to_the_next_point(key, shards, virtual_nodes):
    ring = ConsistentHashPartitioner(tuple(shards), virtual_nodes)
    ahead = {
        (stable_hash(f"{shard}/{v}") - stable_hash(key) - 1) % RING_LENGTH: shard
        for shard in shards
        for v in range(virtual_nodes)
    }
    assert ring.owner(key) == ahead[min(ahead)]
    assert list(ring.successors(key)) == list(dict.fromkeys(ahead[distance] for distance in sorted(ahead)))


@given(st.lists(KEYS), st.sets(st.integers(0, 50), min_size=2, max_size=6), st.integers(0, 50), st.integers(1, 5))
def test_a_ring_moves_keys_only_to_what_comes_and_from_what_goes(keys, shards, shard, virtual_nodes):
    with_it = ConsistentHashPartitioner(tuple(shards | {shard}), virtual_nodes)
    without = ConsistentHashPartitioner(tuple(shards - {shard}), virtual_nodes)
    assert (with_it.without_shard(shard), without.with_shard(shard)) == (without, with_it)
    assert repr(without.with_shard(shard)) == repr(with_it)
    for key in keys:
        assert without.owner(key) == with_it.owner(key) or with_it.owner(key) == shard


@pytest.mark.parametrize("num_shards, virtual_nodes", [(4, 1), (4, 16), (10, 64)])
def test_virtual_nodes_even_a_ring_out_as_the_closed_form_says(num_shards, virtual_nodes):
    shares = []
    for ring in range(60):
        shards = range(100 * ring, 100 * ring + num_shards)
        points = sorted((stable_hash(f"{shard}/{v}"), shard) for shard in shards for v in range(virtual_nodes))
        share = dict.fromkeys(shards, 0)
        for (before, _), (place, shard) in zip([points[-1], *points[:-1]], points, strict=True):
            share[shard] += ((place - before) % RING_LENGTH or RING_LENGTH) / RING_LENGTH
        assert sum(share.values()) == pytest.approx(1)
        shares += share.values()
    expected = ((num_shards - 1) / (num_shards * virtual_nodes + 1)) ** 0.5
    assert statistics.pstdev(shares) * num_shards == pytest.approx(expected, rel=0.2)


def test_rings_that_make_no_sense_are_refused():
    for shards in ((), (1, 1)):
        with pytest.raises(ValueError, match="one shard or more, each once"):
            ConsistentHashPartitioner(shards)
    with pytest.raises(ValueError, match="virtual_nodes must be at least 1, got 0"):
        ConsistentHashPartitioner((0,), 0)
    ring = ConsistentHashPartitioner((0,))
    with pytest.raises(ValueError, match="shard 3 is not on this ring"):
        ring.without_shard(3)
    with pytest.raises(ValueError, match="one shard or more"):
        ring.without_shard(0)
    with pytest.raises(ValueError, match="each once"):
        ring.with_shard(0)


def test_loads_and_imbalance():
    assert loads(RangePartitioner((3, 3)), [1, 2, 3, 3, 9]) == {0: 2, 1: 0, 2: 3}
    assert loads(ConsistentHashPartitioner((4, 9)), []) == {4: 0, 9: 0}
    assert imbalance([2, 0, 3]) == pytest.approx(1.8)
    assert imbalance([5, 5]) == imbalance([0, 0]) == imbalance([3]) == 1
    assert imbalance([0, 0, 0, 8]) == 4
    assert imbalance(loads(HashPartitioner(4), range(4000)).values()) < 1.1
    with pytest.raises(ValueError, match="one shard or more"):
        imbalance([])
