"""Placement: which rack, host or node each member stands in, what a plan's messages cross, and what is lost with one.

    places   0 0 0 0 │ 1 1 1 1          member m stands in places[m]
    spread   copies in as many places as there are: no place's loss takes all of them
    packed   a group within one place: none of its messages crosses

The places of a database's replicas are racks, those of a training run's ranks are nodes joined by NVLink. Replicas are
spread, for safety; the ranks of a tensor-parallel group are packed, for bandwidth.

Source: Shvachko et al. 2010, "The Hadoop Distributed File System", section III.B (replicas over racks).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from minilib.mechanisms.basics.checks import check_whole, is_whole
from minilib.mechanisms.replication import Plan


class Crossing(NamedTuple):
    """What a plan sends from one place to another.

    Args:
        messages: how many messages cross.
        bytes: what they carry together.
        rounds: rounds of the plan in which at least one message crosses.
    """

    messages: int
    bytes: int
    rounds: int


def places_of(num_members: int, members_per_place: int) -> list[int]:
    """Members in a row, so many to a place: [0, 0, 1, 1] for 4 and 2.

    Raises:
        ValueError: if a number is too small, or not whole.
    """
    check_whole("num_members", num_members)
    check_whole("members_per_place", members_per_place, 1)
    return [member // members_per_place for member in range(num_members)]


def crossing(plan: Plan, chunk_bytes: Sequence[int], places: Sequence[int]) -> Crossing:
    """Count the messages of a plan whose ends stand in different places; messages of no bytes are not sent.

    Args:
        plan: who sends what.
        chunk_bytes: bytes of each chunk.
        places: of each of the plan's ranks.

    Raises:
        ValueError: if there is not one place for each rank, or not one whole number of bytes for each chunk.
    """
    if len(places) != plan.world_size:
        raise ValueError(f"places has one entry for each of {plan.world_size} ranks, got {len(places)}")
    if len(chunk_bytes) != plan.num_chunks:
        raise ValueError(f"chunk_bytes has one size for each of {plan.num_chunks} chunks, got {len(chunk_bytes)}")
    for nbytes in chunk_bytes:
        check_whole("bytes of a chunk", nbytes)
    messages = size = rounds = 0
    for transfers in plan.rounds:
        crossed = [t for t in transfers if places[t.src] != places[t.dst]]
        sizes = [sum(chunk_bytes[chunk] for chunk in t.chunks) for t in crossed]
        messages += sum(nbytes > 0 for nbytes in sizes)
        size += sum(sizes)
        rounds += any(sizes)
    return Crossing(messages, size, rounds)


def spread(copies: int, places: Sequence[int], first: int = 0) -> list[int]:
    """Members for the copies of one record, in as many places as there are; `first` has the first copy.

    Raises:
        ValueError: if there are fewer members than copies, or no such member.
    """
    whole = is_whole(first, 0) and is_whole(copies, 1)
    if not whole or first >= len(places) or copies > len(places):
        raise ValueError(f"needs 1 ≤ copies ≤ {len(places)} and a first among them, got {copies=}, {first=}")
    chosen = [first]
    while len(chosen) < copies:
        held = [places[member] for member in chosen]
        left = [member for member in range(len(places)) if member not in chosen]
        chosen.append(min(left, key=lambda member: (held.count(places[member]), member)))
    return chosen


def lost_with(place: int, groups: Iterable[Collection[int]], places: Sequence[int]) -> list[int]:
    """Numbers of the groups all of whose members stand in a place: what the loss of the place takes with it.

    Raises:
        ValueError: if there is no place for a member.
    """
    lost = []
    for number, group in enumerate(groups):
        for member in group:
            if not is_whole(member, 0) or member >= len(places):
                raise ValueError(f"members are 0 … {len(places) - 1}, got {member!r} in group {number}")
        if {places[member] for member in group} == {place}:
            lost.append(number)
    return lost
