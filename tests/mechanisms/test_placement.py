"""Crossings of a plan counted by hand and in closed form, copies spread over places, and what a lost place takes."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.replication import plans
from minilib.mechanisms.sharding.placement import Crossing, crossing, lost_with, places_of, spread


def test_a_ring_crosses_twice_where_neighbours_stand_together_and_everywhere_where_they_alternate():
    ring, chunks = plans.ring("all_reduce", 8), [10] * 8
    rounds = 2 * 7
    assert crossing(ring, chunks, places_of(8, 4)) == Crossing(2 * rounds, 2 * rounds * 10, rounds)
    assert crossing(ring, chunks, [0, 1] * 4) == Crossing(8 * rounds, 8 * rounds * 10, rounds)
    assert crossing(ring, chunks, [0] * 8) == Crossing(0, 0, 0)


def test_two_levels_cross_with_a_share_of_the_bytes():
    """h racks of m members: each member sends 2 (h-1)/h · S/m between racks, however many there are of them."""
    places = places_of(6, 3)
    plan = plans.two_level(places)
    assert crossing(plan, [5] * plan.num_chunks, places).bytes == 6 * 2 * (1 / 2) * (5 * plan.num_chunks) / 3


def test_messages_of_no_bytes_are_not_sent():
    ring = plans.ring("all_gather", 3)
    assert crossing(ring, [7, 0, 0], [0, 1, 2]) == Crossing(2, 14, 2)


def test_a_place_for_every_rank():
    with pytest.raises(ValueError, match="one entry for each of 4 ranks, got 3"):
        crossing(plans.ring("all_reduce", 4), [1] * 4, [0, 0, 1])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_copies_stand_in_as_many_places_as_there_are(places, data):
    copies = data.draw(st.integers(1, len(places)))
    first = data.draw(st.integers(0, len(places) - 1))
    chosen = spread(copies, places, first)
    assert chosen[0] == first and len(set(chosen)) == copies
    held = Counter(places[member] for member in chosen)
    assert len(held) == min(copies, len(set(places)))
    room = Counter(places)
    for place, count in held.items():  # no place has two more than another that has room
        assert all(count <= held[other] + 1 or held[other] == room[other] for other in room), (place, held)


@pytest.mark.parametrize(("copies", "first"), [(0, 0), (4, 0), (2, 3), (2, -1)])
def test_copies_that_do_not_exist(copies, first):
    with pytest.raises(ValueError, match="1 ≤ copies ≤ 3"):
        spread(copies, [0, 0, 1], first)


def test_a_lost_place_takes_what_stands_in_it_alone():
    places = [0, 0, 1, 1]
    packed, apart = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    assert lost_with(0, packed, places) == [0] and lost_with(1, packed, places) == [1]
    assert lost_with(0, apart, places) == lost_with(1, apart, places) == []


def test_members_in_a_row():
    assert places_of(5, 2) == [0, 0, 1, 1, 2] and places_of(0, 3) == []
    with pytest.raises(ValueError, match="members_per_place is a whole number ≥ 1, got 0"):
        places_of(4, 0)


RING = plans.ring("all_reduce", 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: places_of(4.0, 2), "num_members is a whole number ≥ 0, got 4.0"),
        (lambda: places_of(-1, 2), "num_members is a whole number ≥ 0, got -1"),
        (lambda: places_of(4, 2.0), "members_per_place is a whole number ≥ 1, got 2.0"),
        (lambda: places_of(4, True), "members_per_place is a whole number ≥ 1, got True"),
        (lambda: crossing(RING, [1], [0, 1]), "one size for each of 2 chunks, got 1"),
        (lambda: crossing(RING, [1, 1, 1], [0, 1]), "one size for each of 2 chunks, got 3"),
        (lambda: crossing(RING, [1, -1], [0, 1]), "bytes of a chunk is a whole number ≥ 0, got -1"),
        (lambda: crossing(RING, [1, math.nan], [0, 1]), "bytes of a chunk is a whole number ≥ 0, got nan"),
        (lambda: spread(2.5, [0, 0, 1]), "1 ≤ copies ≤ 3"),
        (lambda: spread(True, [0, 0, 1]), "1 ≤ copies ≤ 3"),
        (lambda: spread(1, [0, 0, 1], first=1.0), "a first among them"),
        (lambda: spread(1, []), "1 ≤ copies ≤ 0"),
        (lambda: lost_with(0, [[0, 4]], [0, 0, 1, 1]), "members are 0 … 3, got 4 in group 0"),
        (lambda: lost_with(0, [[0], [-4]], [0, 0, 1, 1]), "members are 0 … 3, got -4 in group 1"),
        (lambda: lost_with(0, [[0.0]], [0]), "members are 0 … 0, got 0.0"),
    ],
)
def test_numbers_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_group_of_nobody_is_not_lost():
    assert lost_with(0, [[]], [0]) == lost_with(0, [], []) == []
