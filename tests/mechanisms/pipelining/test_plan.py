"""A plan's timeline against a solver that only relaxes inequalities; deadlocks and other bad plans are named."""

import random

import pytest

from minilib.mechanisms.pipelining import Deadlock, InvalidPlan, Operation, timeline_of


def relaxed(plan, seconds, transfer):
    """Start of every operation: the least solution of all inequalities, found by repeating them until nothing moves."""
    home = {operation.key: worker for worker, operations in enumerate(plan) for operation in operations}
    start = dict.fromkeys(home, 0)
    for _ in range(len(home) + 1):
        for worker, operations in enumerate(plan):
            for number, operation in enumerate(operations):
                bounds = [start[key] + seconds(key) + transfer * (home[key] != worker) for key in operation.after]
                bounds += [start[key] for key in operation.room]
                bounds += [start[operations[number - 1].key] + seconds(operations[number - 1].key)] if number else []
                start[operation.key] = max([0, *bounds])
    return start


@pytest.mark.parametrize("seed", range(30))
def test_a_timeline_is_the_least_solution(seed):
    """Random plans without a circle: everything waits for keys that are smaller."""
    draw = random.Random(seed)
    plan = [[] for _ in range(draw.randint(1, 4))]
    times = {}
    for key in range(draw.randint(0, 30)):
        waits = [tuple(draw.sample(range(key), min(key, draw.randint(0, 3)))) for _ in range(2)]
        draw.choice(plan).append(Operation(key, *waits))
        times[key] = draw.randint(0, 5)
    transfer = draw.choice((0, 2))
    timeline = timeline_of(plan, times.__getitem__, transfer)
    expected = relaxed(plan, times.__getitem__, transfer)
    assert {span.key: span.start for span in timeline} == expected
    assert {span.key: span.end - span.start for span in timeline} == times
    assert timeline.makespan == max((expected[key] + times[key] for key in times), default=0)
    assert sum(timeline.busy(worker) + timeline.idle(worker) for worker in range(len(plan))) == pytest.approx(
        len(plan) * timeline.makespan
    )
    if timeline.makespan:
        assert timeline.bubble == pytest.approx(1 - sum(times.values()) / (len(plan) * timeline.makespan))


def test_a_deadlock_names_the_workers_that_wait_for_one_another_and_what_for():
    plan = [
        [Operation("a"), Operation("b", after=("d",)), Operation("c")],
        [Operation("d", after=("e",)), Operation("f")],
        [Operation("e", room=("c",))],
        [Operation("g"), Operation("h", after=("f",))],
    ]
    with pytest.raises(Deadlock, match="worker 0 waits before b for d of worker 1; worker 1 .* d for e of worker 2;"
                                       " worker 2 waits before e for c of worker 0") as caught:  # fmt: skip
        timeline_of(plan, lambda key: 1)
    assert caught.value.stuck == {0: "b", 1: "d", 2: "e"}


def test_an_operation_that_waits_for_itself_or_for_a_later_one_of_its_worker():
    for waits in ("a", "b"):
        with pytest.raises(Deadlock, match=f"worker 0 waits before a for {waits} of worker 0"):
            timeline_of([[Operation("a", after=(waits,)), Operation("b")]], lambda key: 1)


@pytest.mark.parametrize(
    ("plan", "time", "transfer", "message"),
    [
        ([[Operation("a")], [Operation("a")]], 1, 0, "a is in the list of worker 0 and in that of 1"),
        ([[Operation("a", room=("z",))]], 1, 0, "a of worker 0 waits for z, which no worker does"),
        ([[Operation("a")]], -1, 0, "a takes a time of 0 or more, got -1"),
        ([[Operation("a")]], float("nan"), 0, "a takes a time of 0 or more, got nan"),
        ([[Operation("a")]], float("inf"), 0, "a takes a time of 0 or more, got inf; it has to be finite"),
        ([[Operation("a")]], 1, -1, "transfer is a time, 0 or more, got -1"),
        ([[Operation("a")]], 1, float("nan"), "transfer is a time, 0 or more, got nan"),
        ([[Operation("a")]], 1, float("inf"), "transfer is a time, 0 or more, got inf; it has to be finite"),
    ],
)
def test_bad_plans_are_refused(plan, time, transfer, message):
    with pytest.raises(ValueError, match=message) as caught:
        timeline_of(plan, lambda key: time, transfer)
    assert isinstance(caught.value, InvalidPlan) == ("worker" in message)


def test_nobody_and_nothing():
    for plan in ([], [[]], [[], []]):
        timeline = timeline_of(plan, lambda key: 1)
        assert (timeline.makespan, timeline.bubble, list(timeline)) == (0, 0, [])
