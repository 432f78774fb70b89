"""A rank's steps are its transfers in the plan's order, and what may be asked for ahead overwrites nothing."""

from itertools import pairwise

import pytest

from minilib.ranks.rank_steps import steps_of
from tests.ranks.collective_cases import all_reduce_plans


def chunks(transfer) -> set[int]:
    return set(range(transfer.chunk, transfer.chunk + transfer.count)) if transfer else set()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_steps_are_the_transfers_of_the_plan(world_size):
    for plan in filter(None, all_reduce_plans(world_size)):
        for rank in range(world_size):
            steps = steps_of(plan, rank)
            everything = [t for transfers in plan.rounds for t in transfers]
            assert [step.out for step in steps if step.out] == [t for t in everything if t.src == rank]
            assert [step.into for step in steps if step.into] == [t for t in everything if t.dst == rank]
            assert all(step.out or step.into for step in steps)


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8])
def test_what_comes_ahead_is_what_comes_next_and_is_not_sent_before(world_size):
    found = 0
    for plan in filter(None, all_reduce_plans(world_size)):
        for rank in range(world_size):
            steps = steps_of(plan, rank)
            assert steps[-1].ahead is None
            assert all(step.keep == bool(chunks(step.out) & chunks(step.into)) for step in steps)
            for step, following in pairwise(steps):
                free = not chunks(following.out) & chunks(following.into)
                same = bool(step.into and following.into) and step.into.src == following.into.src
                assert step.ahead == (following.into if same and free else None)
                found += step.ahead is not None
    assert found
