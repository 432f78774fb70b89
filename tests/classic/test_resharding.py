"""What moves, against a count of every residue, of every place in a row, and over many rings."""

import math
from fractions import Fraction

import pytest

from minilib.classic.resharding import Moves, expected_moved, moves
from minilib.mechanisms.sharding import ConsistentHashPartitioner, HashPartitioner, RangePartitioner

COUNTS = [(n, m) for n in range(1, 8) for m in range(1, 8)]


def test_moves_are_counted_by_pair():
    old, new = RangePartitioner((4,)), RangePartitioner((2, 6))
    assert moves(old, new, range(8)) == Moves({(0, 1): 2, (1, 2): 2}, 8)
    assert (moves(old, new, range(8)).moved, moves(old, new, range(8)).fraction) == (4, 0.5)
    assert moves(old, old, range(8)).fraction == moves(old, new, []).fraction == 0


@pytest.mark.parametrize("old, new", COUNTS)
def test_a_remainder_moves_as_many_residues_as_expected(old, new):
    residues = range(math.lcm(old, new))
    moved = sum(residue % old != residue % new for residue in residues)
    assert expected_moved("modulo", old, new) == Fraction(moved, len(residues))


@pytest.mark.parametrize("old, new", COUNTS)
def test_even_ranges_move_as_many_keys_as_expected(old, new):
    keys = range(old * new)
    counted = moves(RangePartitioner.even(len(keys), old), RangePartitioner.even(len(keys), new), keys)
    assert expected_moved("range", old, new) == Fraction(counted.moved, len(keys))


@pytest.mark.parametrize("old, new", [(1, 2), (4, 5), (5, 3), (4, 4)])
def test_rings_move_as_many_keys_as_expected(old, new):
    fractions = []
    for first in range(0, 3000, 100):
        before, after = (ConsistentHashPartitioner(range(first, first + n), 16) for n in (old, new))
        fractions.append(moves(before, after, range(200)).fraction)
    assert sum(fractions) / len(fractions) == pytest.approx(float(expected_moved("consistent", old, new)), abs=0.03)


def test_hashed_keys_move_as_expected():
    for old, new in ((4, 5), (4, 8), (6, 4)):
        counted = moves(HashPartitioner(old), HashPartitioner(new), range(4000))
        assert counted.fraction == pytest.approx(float(expected_moved("modulo", old, new)), abs=0.03)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_one_shard_more(n):
    assert expected_moved("modulo", n, n + 1) == Fraction(n, n + 1)
    assert expected_moved("range", n, n + 1) == Fraction(1, 2)
    assert expected_moved("consistent", n, n + 1) == Fraction(1, n + 1)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="got 0 and 3"):
        expected_moved("modulo", 0, 3)
    with pytest.raises(ValueError, match="'modulo', 'range' or 'consistent', got 'magic'"):
        expected_moved("magic", 1, 2)
