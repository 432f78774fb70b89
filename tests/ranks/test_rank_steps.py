"""A rank's steps are its transfers in the plan's order, and say where a rank must keep what it sends."""

import pytest

from minilib.mechanisms.replication import Plan, Transfer
from minilib.ranks.rank_steps import steps_of
from tests.ranks.collective_cases import all_reduce_plans


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_steps_are_the_transfers_of_the_plan(world_size):
    for plan in filter(None, all_reduce_plans(world_size)):
        for rank in range(world_size):
            steps = steps_of(plan, rank)
            everything = [t for transfers in plan.rounds for t in transfers]
            assert [step.out for step in steps if step.out] == [t for t in everything if t.src == rank]
            assert [step.into for step in steps if step.into] == [t for t in everything if t.dst == rank]
            assert all(step.out or step.into for step in steps)


@pytest.mark.parametrize(
    ("out", "into", "keep"),
    [
        (Transfer(0, 1, 0, count=2), Transfer(1, 0, 2, count=2), False),
        (Transfer(0, 1, 0, count=2), Transfer(1, 0, 1, count=2), True),
        (Transfer(0, 1, 0, count=2, stride=2), Transfer(1, 0, 1, count=2, stride=2), False),  # 0 2 and 1 3
        (Transfer(0, 1, 0, count=2, stride=3), Transfer(1, 0, 1, count=2, stride=2), True),  # 0 3 and 1 3
    ],
)
def test_a_rank_keeps_what_it_sends_where_it_receives(out, into, keep):
    plan = Plan("swap", "all_reduce", 2, 4, ((out, into),))
    assert [step.keep for step in steps_of(plan, 0)] == [keep]
