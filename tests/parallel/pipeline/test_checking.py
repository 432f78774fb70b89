"""A schedule with any single fault is refused, and the rank and the action at fault are named."""

import dataclasses
import random

import pytest

from minilib.parallel.pipeline.checking import ScheduleDeadlock, UnsoundSchedule, check_schedule
from minilib.parallel.pipeline.schedule import Action, PipelineSchedule
from minilib.parallel.pipeline.schedules import SCHEDULES


def read(text: str) -> Action:
    return Action(int(text[0]), text[1], int(text[2]))


def schedule(*rows: str, rank_of=(0, 1)) -> PipelineSchedule:
    return dataclasses.replace(PipelineSchedule.read("mine", "\n".join(rows), rank_of), num_microbatches=2)


GOOD = ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1I1 1W1")


def test_a_sound_one():
    check_schedule(schedule(*GOOD))


@pytest.mark.parametrize(
    ("rows", "rank", "action", "message"),
    [
        (("0F0 0F1 0B0", GOOD[1]), 0, "0B1", "rank 0 lacks 0B1, the backward of microbatch 1 on stage 0"),
        (("0F0 0B0 0B1", GOOD[1]), 0, "0F1", "rank 0 lacks 0F1, the forward"),
        ((GOOD[0], "1F0 1B0 1F1 1I1"), 1, "1W1", "rank 1 lacks 1W1, the weight gradient"),
        ((GOOD[0], "1F0 1B0 1F1 1W1"), 1, "1I1", "rank 1 lacks 1I1, the input gradient"),
        ((GOOD[0] + " 0B1", GOOD[1]), 0, "0B1", "rank 0, action 4, 0B1: is there a second time"),
        ((GOOD[0] + " 0W1", GOOD[1]), 0, "0W1", "would count a gradient a second time, which 0B1 computes"),
        ((GOOD[0], GOOD[1] + " 1B1"), 1, "1B1", "would count a gradient a second time, which 1I1 computes"),
        ((GOOD[0] + " 1F0", GOOD[1]), 0, "1F0", "rank 0, action 4, 1F0: stage 1 is on rank 1"),
        ((GOOD[0] + " 0F2", GOOD[1]), 0, "0F2", "there are 2 stages and 2 microbatches, numbered from 0"),
        ((GOOD[0] + " 2F0", GOOD[1]), 0, "2F0", "there are 2 stages and 2 microbatches"),
        ((GOOD[0] + " 0X0", GOOD[1]), 0, "0X0", "an action is one of F, B, I, W"),
    ],
)
def test_what_is_missing_double_or_elsewhere(rows, rank, action, message):
    with pytest.raises(UnsoundSchedule, match=message) as caught:
        check_schedule(schedule(*rows))
    assert (caught.value.rank, caught.value.action) == (rank, read(action))
    assert not isinstance(caught.value, ScheduleDeadlock)


def test_a_stage_on_a_rank_that_there_is_not():
    with pytest.raises(UnsoundSchedule, match="stage 1 is on rank 2, and there are 2 ranks"):
        check_schedule(schedule(*GOOD, rank_of=(0, 2)))


@pytest.mark.parametrize(
    ("rows", "rank", "action", "message"),
    [
        (("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), 0, "0B0",
         "rank 0 waits before 0B0 for 1B0 of rank 1; rank 1 waits before 1F1 for 0F1 of rank 0"),
        (("0F0 0B1 0F1 0B0", GOOD[1]), 0, "0B1", "rank 0 waits before 0B1 for 1I1 of rank 1"),
        ((GOOD[0], "1F0 1B0 1F1 1W1 1I1"), 1, "1W1", "deadlock: rank 1 waits before 1W1 for 1I1 of rank 1$"),
    ],
)  # fmt: skip
def test_deadlocks(rows, rank, action, message):
    with pytest.raises(ScheduleDeadlock, match=message) as caught:
        check_schedule(schedule(*rows))
    assert (caught.value.rank, caught.value.action) == (rank, read(action))


def test_sends_that_block_cross_in_most_schedules():
    """A rank that sends waits for one that sends to it; in gpipe all messages go one way at a time."""
    crossed = set()
    for name, make in SCHEDULES.items():
        try:
            check_schedule(make(2, 8), blocking=True)
        except ScheduleDeadlock:
            crossed.add(name)
    assert crossed == {"1f1b", "zero-bubble", "zbv", "dual-pipe-v", "interleaved", "breadth-first"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_action_can_be_left_out_doubled_or_given_to_another_rank(name):
    sound = SCHEDULES[name](2, 4)
    for rank, actions in enumerate(sound.actions):
        for number, action in enumerate(actions):
            without = actions[:number] + actions[number + 1 :]
            doubled = (*actions, action)
            for row in (without, doubled):
                with pytest.raises(UnsoundSchedule) as caught:
                    check_schedule(_with_row(sound, rank, row))
                assert caught.value.rank == rank
                assert caught.value.action[0] == action.stage and caught.value.action[2] == action.microbatch
            moved = _with_row(_with_row(sound, rank, without), 1 - rank, (*sound.actions[1 - rank], action))
            with pytest.raises(UnsoundSchedule, match=f"{action}: stage {action.stage} is on rank {rank}"):
                check_schedule(moved)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_shuffled_rank_is_refused_or_respects_every_dependency(name):
    """Of random orders of one rank's actions, those that pass can be executed one action at a time, whoever may go."""
    draw, refused = random.Random(0), 0
    sound = SCHEDULES[name](2, 4)
    for _ in range(30):
        row = list(sound.actions[1])
        one, other = draw.sample(range(len(row)), 2)
        row[one], row[other] = row[other], row[one]
        shuffled = _with_row(sound, 1, tuple(row))
        try:
            check_schedule(shuffled)
        except ScheduleDeadlock:
            refused += 1
            assert not _executes(shuffled)
        else:
            assert _executes(shuffled)
    assert 0 < refused < 30


def _executes(schedule) -> bool:
    """Whether ranks that take turns get to the end."""
    left, done = [list(actions) for actions in schedule.actions], set()
    moved = True
    while moved:
        moved = False
        for row in left:
            while row and _may_go(row[0], done, schedule.num_stages):
                done.add(row.pop(0))
                moved = True
    return not any(left)


def _may_go(action, done, num_stages) -> bool:
    stage, kind, microbatch = action
    if kind == "F":
        return stage == 0 or (stage - 1, "F", microbatch) in done
    if kind == "W":
        return (stage, "I", microbatch) in done
    below = stage == num_stages - 1 or {(stage + 1, "B", microbatch), (stage + 1, "I", microbatch)} & done
    return bool(below) and (stage, "F", microbatch) in done


def _with_row(schedule, rank, row):
    rows = list(schedule.actions)
    rows[rank] = tuple(row)
    return dataclasses.replace(schedule, actions=tuple(rows))
