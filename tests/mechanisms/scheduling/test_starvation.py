"""Nobody starves: whatever arrives, waits are within what each policy states; and tenants get their shares."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.scheduling import (
    AgedPriority,
    EarliestDeadline,
    FairShare,
    FirstComeFirstServed,
    MultiLevelFeedback,
    ShortestRemaining,
    Task,
    TimeSlicing,
)
from tests.mechanisms.scheduling.single_server import serve

TENANTS = {"a": 1, "b": 2, "c": 0.5}
SETTINGS = {
    "fcfs": FirstComeFirstServed,
    "round robin 1": lambda: TimeSlicing(1),
    "round robin 3": lambda: TimeSlicing(3),
    "feedback": lambda: MultiLevelFeedback((1, 2, 4), boost=12),
    "feedback, often boosted": lambda: MultiLevelFeedback((2, 3), boost=1),
    "priority": lambda: AgedPriority(patience=3),
    "srpt": lambda: ShortestRemaining(patience=2),
    "fair share": FairShare,
    "fair share by weight": lambda: FairShare(TENANTS),
    "deadline": lambda: EarliestDeadline(horizon=25),
}
TASK = st.tuples(
    st.integers(0, 60),  # arrival
    st.integers(1, 8),  # cost
    st.integers(0, 8),  # predicted
    st.integers(0, 5),  # priority
    st.sampled_from(sorted(TENANTS)),
    st.sampled_from([math.inf, 1, 5, 30]),  # time to the deadline
)


@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
def test_nobody_waits_longer_than_stated(make):
    @given(st.lists(TASK, min_size=1, max_size=25), st.dictionaries(st.integers(0, 24), st.integers(0, 80), max_size=3))
    @settings(max_examples=120)
    def check(given_tasks, cancelled):
        tasks = [
            Task(
                key=key, arrival=arrival, predicted=predicted, priority=priority, tenant=tenant, deadline=arrival + room
            )
            for key, (arrival, _, predicted, priority, tenant, room) in enumerate(given_tasks)
        ]
        costs = {key: row[1] for key, row in enumerate(given_tasks)}
        result = serve(make(), tasks, costs, cancel=cancelled)
        assert result.ended.keys() | cancelled.keys() >= costs.keys(), "a task was never completed"
        for key in result.ended:
            assert result.others[key] <= result.bounds[key]

    check()


ADVERSARIES = {
    "fcfs": lambda number: {},
    "priority": lambda number: {"priority": 0},
    "srpt": lambda number: {"predicted": 1},
    "round robin": lambda number: {},
    "feedback": lambda number: {},
    "deadline": lambda number: {"deadline": number + 2},
    "fair share": lambda number: {"tenant": "abc"[number % 3]},
}
VICTIMS = {
    "fcfs": FirstComeFirstServed,
    "priority": lambda: AgedPriority(patience=9),
    "srpt": lambda: ShortestRemaining(patience=4),
    "round robin": lambda: TimeSlicing(2),
    "feedback": lambda: MultiLevelFeedback((2, 4), boost=20),
    "deadline": lambda: EarliestDeadline(horizon=30),
    "fair share": FairShare,
}


@pytest.mark.parametrize("name", VICTIMS)
def test_an_endless_stream_of_better_tasks_delays_one_as_long_as_stated(name):
    """A stream that fills the server for ever, whose tasks all look better than the one that waits."""
    policy, victim = VICTIMS[name](), Task(key="victim", priority=4, predicted=10, tenant="v")
    tasks = [Task(key=0, **ADVERSARIES[name](0)), victim]
    tasks += [Task(key=number, arrival=number, **ADVERSARIES[name](number)) for number in range(1, 400)]
    for task in tasks:
        task.predicted = task.predicted or 1
    result = serve(policy, tasks, {"victim": 10, **dict.fromkeys(range(400), 1)})
    waited = result.others["victim"]
    assert waited <= result.bounds["victim"]
    assert result.order.index("victim") < 399, "it was served when nobody else was left"
    least = {"priority": 36, "deadline": 28, "feedback": 18}
    assert waited >= least.get(name, 1), "the stream delays nobody, so this shows nothing"


def backlogged(policy, draws, units):
    """Service of each tenant in every window, while all tenants always have a task in the line."""
    costs, received, history, number = {}, dict.fromkeys(TENANTS, 0), [], 0
    while sum(received.values()) < units:
        for tenant in TENANTS:
            while sum(task.tenant == tenant for task in policy) < 2:
                number += 1
                task = Task(key=number, tenant=tenant)
                costs[task] = draws.randint(1, 9)
                policy.arrive(task)
        task = policy.first()
        policy.serve(task, 1)
        received[task.tenant] += 1
        costs[task] -= 1
        if not costs[task]:
            policy.remove(task)
        history.append(dict(received))
    return history


@pytest.mark.parametrize("weights", [None, TENANTS])
def test_backlogged_tenants_receive_their_shares_within_the_bound_of_the_paper(weights):
    """Theorem: service per weight of two backlogged tenants differs by at most 2 U in any window."""
    history = backlogged(FairShare(weights), random.Random(1), 600)
    weight = weights or dict.fromkeys(TENANTS, 1)
    most = 2 * 1 / min(weight.values())
    gap = 0
    for begin in range(0, len(history), 7):
        for end in range(begin, len(history), 11):
            share = {key: (history[end][key] - history[begin][key]) / weight[key] for key in TENANTS}
            gap = max(gap, max(share.values()) - min(share.values()))
    assert 0 < gap <= most


def test_the_same_tenants_under_first_come_first_served_are_further_apart():
    """So that the bound above means something: the tenant that sends more receives more."""
    policy = FirstComeFirstServed()
    tasks = [Task(key=("a", number), tenant="a") for number in range(50)] + [Task(key="b", tenant="b")]
    assert serve(policy, tasks, {task.key: 1 for task in tasks}).others["b"] == 50
    tasks = [Task(key=("a", number), tenant="a") for number in range(50)] + [Task(key="b", tenant="b")]
    assert serve(FairShare(), tasks, {task.key: 1 for task in tasks}).others["b"] == 1


def test_who_comes_back_has_no_credit_and_keeps_its_debt():
    policy = FairShare()
    one, two = Task(key=1, tenant="a"), Task(key=2, tenant="b")
    policy.arrive(one)
    policy.serve(one, 100)
    policy.arrive(two)
    assert policy.counters == {"a": 100, "b": 100}, "b was away and has no credit"
    policy.serve(two, 30)
    policy.remove(two)
    back = Task(key=3, tenant="b")
    policy.arrive(back)
    assert policy.counters["b"] == 130, "b keeps its debt"
    policy.remove(back)
    policy.remove(one)
    last = Task(key=4, tenant="c")
    policy.arrive(last)
    assert policy.counters["c"] == policy.counters["a"] == 100, "nobody waits: as the one that left last"


def test_who_runs_and_does_not_wait_gains_no_credit():
    """Of the paper: a tenant with nothing in the line is lifted, even while a request of its own runs."""
    policy = FairShare()
    slow, fast, more = Task(key=1, tenant="slow"), Task(key=2, tenant="fast"), Task(key=3, tenant="fast")
    for task in (slow, fast, more):
        policy.arrive(task)
    policy.admit(slow)
    policy.admit(fast)
    policy.serve(slow, 1)
    policy.serve(fast, 50)
    burst = Task(key=4, tenant="slow")
    policy.arrive(burst)
    assert policy.counters == {"slow": 50, "fast": 50}
    policy.check_invariants()


def test_tenants_that_are_gone_are_forgotten_and_debts_are_not():
    policy = FairShare()
    steady = Task(key="steady", tenant="steady")
    policy.arrive(steady)
    for number in range(1000):
        task = Task(key=number, tenant=f"tenant {number}")
        policy.arrive(task)
        policy.serve(task, 2)
        policy.remove(task)
        policy.serve(steady, 3)
        policy.check_invariants()
        assert len(policy.counters) < 9
    debtor = Task(key="d", tenant="debtor")
    policy.arrive(debtor)
    policy.serve(debtor, 10)
    policy.remove(debtor)
    for number in range(20):
        policy.arrive(task := Task(key=number, tenant=f"tenant {number}"))
        policy.remove(task)
    policy.arrive(back := Task(key="d", tenant="debtor"))
    assert policy.counters["debtor"] == 3_010
    assert policy.first() is steady
    policy.remove(back)
