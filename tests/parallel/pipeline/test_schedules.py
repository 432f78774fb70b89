"""Schedules against torch.distributed.pipelining's own, order by order, and ours in its validators."""

import itertools

import pytest

from minilib.parallel.pipeline.checking import check_schedule
from minilib.parallel.pipeline.schedule import PipelineSchedule
from minilib.parallel.pipeline.schedules import SCHEDULES, ImpossibleSchedule
from tests.parallel.pipeline import torch_orders

RANKS, MICROBATCHES = (1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
SEVERAL = ("breadth-first", "interleaved", "zero-bubble")
ALL = [
    (name, ranks, microbatches, per_rank)
    for name, ranks, microbatches in itertools.product(SCHEDULES, RANKS, MICROBATCHES)
    for per_rank in ((1, 2, 3) if name in SEVERAL else (2,) if name in ("zbv", "dual-pipe-v") else (1,))
]


def make(name, ranks, microbatches, per_rank):
    return SCHEDULES[name](ranks, microbatches, *([per_rank] if name in SEVERAL else []))


def texts(schedule):
    return [[str(action) for action in actions] for actions in schedule.actions]


def test_every_order_is_torchs():
    """Also which ones are impossible; but torch refuses 1F1B with fewer microbatches than stages, which works here."""
    compared = 0
    for case in ALL:
        name, ranks, microbatches, _ = case
        try:
            theirs = torch_orders.order(*case)
        except ValueError:
            if name == "1f1b":
                assert microbatches < ranks
                check_schedule(make(*case))
                continue
            with pytest.raises(ImpossibleSchedule):
                make(*case)
            continue
        assert texts(make(*case)) == theirs, case
        compared += 1
    assert compared > 300


def test_every_schedule_passes_their_validators_and_ours():
    """Their simulation, too, which finds deadlocks among sends and receives."""
    for case in ALL:
        try:
            schedule = make(*case)
        except ImpossibleSchedule:
            continue
        check_schedule(schedule)
        theirs = torch_orders.as_theirs(schedule)
        found = torch_orders.VALIDATE(theirs, schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
        assert found == dict(enumerate(schedule.rank_of))
        if schedule.num_microbatches <= 5:
            with_messages = torch_orders.ADD_COMMUNICATION(theirs, schedule.rank_of.__getitem__, schedule.num_stages)
            for rank, actions in enumerate(schedule.actions):
                sent = [str(action).replace("SEND_", "") for action in with_messages[rank] if "SEND" in str(action)]
                ours = [action for action in actions for other in range(schedule.num_ranks)
                        if action in set(schedule.messages(rank, other))]  # fmt: skip
                assert sent == [str(action).replace("I", "B") for action in ours], case
            torch_orders.SIMULATE(with_messages, schedule.rank_of.__getitem__, schedule.num_stages)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("gpipe", (0, 1), "needs 1 rank or more, 1 stage a rank or more and 1 microbatch or more; got 0 ranks"),
        ("1f1b", (2, 0), "and 0 microbatches"),
        ("breadth-first", (2, 2, 0), "0 stages and 2 microbatches"),
        ("interleaved", (2, 4, 0), "got 2 ranks, 0 stages and 4 microbatches"),
        ("zero-bubble", (2, 4, -1), "got 2 ranks, -2 stages and 4 microbatches"),
        ("zbv", (0, 0), "got 0 ranks, 0 stages and 0 microbatches"),
        ("interleaved", (2, 5), "5 microbatches do not divide into 2 rounds over 2 ranks; make them a multiple"),
        ("zero-bubble", (4, 9), "9 microbatches do not divide into 2 rounds over 4 ranks"),
        ("dual-pipe-v", (2, 3), "needs as many microbatches as stages, which are 4, got 3"),
    ],
)
def test_impossible_schedules(name, numbers, message):
    with pytest.raises(ImpossibleSchedule, match=message):
        SCHEDULES[name](*numbers)
    for some in itertools.product((-1, 0), (-1, 0, 1, 2)):
        with pytest.raises(ImpossibleSchedule):
            SCHEDULES[name](*some)


def test_a_schedule_reads_as_lines_of_actions():
    schedule = SCHEDULES["1f1b"](2, 3)
    assert str(schedule) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"
    for make in SCHEDULES.values():
        one = make(2, 12)  # of two digits, too
        assert PipelineSchedule.read(one.name, str(one), one.rank_of) == one
    with pytest.raises(ValueError, match="an action is stage, kind and microbatch, such as 2F3; got 'F0'"):
        PipelineSchedule.read("mine", "0F0 F0", [0])
    for text in ("", "\n", "  "):
        with pytest.raises(ValueError, match="mine: there is no action in"):
            PipelineSchedule.read("mine", text, [0])
    idle = PipelineSchedule.read("mine", "0F0 0B0\n", [0])
    assert idle.num_ranks == 2 and str(idle) == "0F0 0B0\n", "an empty line is a rank without a stage"
    assert (schedule.num_ranks, schedule.num_stages, schedule.stages_of(1)) == (2, 2, [1])
    assert [str(action) for action in schedule.messages(1, 0)] == ["1B0", "1B1", "1B2"]
    assert SCHEDULES["zbv"](2, 1).stages_of(0) == [0, 3]
