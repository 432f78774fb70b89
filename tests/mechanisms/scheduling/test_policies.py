"""Policies against closed forms, against brute force over all schedules, and against what they refuse."""

import functools
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.scheduling import (
    POLICIES,
    AgedPriority,
    DeadlinePassed,
    EarliestDeadline,
    FairShare,
    FirstComeFirstServed,
    InvalidPriority,
    InvalidTask,
    InvalidWeight,
    MultiLevelFeedback,
    ShortestRemaining,
    Task,
    TimeSlicing,
    UnknownCost,
    UnknownPolicy,
    UnknownTenant,
    make_policy,
)
from tests.mechanisms.scheduling.single_server import at_once, serve

PURE = math.inf
COSTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def turnaround(result, tasks):
    return sum(result.ended[task.key] - task.arrival for task in tasks)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=12))
def test_first_come_first_served_is_the_order_of_arrival_and_never_switches(given_tasks):
    tasks = [Task(key=key, arrival=arrival) for key, (arrival, _) in enumerate(given_tasks)]
    result = serve(FirstComeFirstServed(), tasks, {key: cost for key, (_, cost) in enumerate(given_tasks)})
    arrivals = sorted(tasks, key=lambda task: task.arrival)
    assert result.order == [task.key for task in arrivals]
    clock = 0
    for task in arrivals:  # Lindley's recursion
        clock = max(clock, task.arrival) + given_tasks[task.key][1]
        assert result.ended[task.key] == clock


@given(COSTS, st.booleans())
def test_shortest_job_first_has_the_least_mean_waiting_time_of_all_orders(costs, preemptive):
    tasks, by_key = at_once(costs)
    result = serve(ShortestRemaining(PURE), tasks, by_key, preemptive)
    least = min(sum(itertools.accumulate(order)) for order in itertools.permutations(costs))
    assert turnaround(result, tasks) == least


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=4))
@settings(max_examples=60)
def test_shortest_remaining_has_the_least_turnaround_of_all_schedules(given_tasks):
    tasks = [Task(key=key, arrival=arrival, predicted=cost) for key, (arrival, cost) in enumerate(given_tasks)]
    arrivals = [arrival for arrival, _ in given_tasks]
    horizon = max(arrivals) + sum(cost for _, cost in given_tasks)

    @functools.cache
    def least(clock, left):
        """The smallest sum of completion times from here on, over all choices, idling included."""
        if not any(left):
            return 0
        if clock == horizon:
            return math.inf
        best = least(clock + 1, left)
        for key, units in enumerate(left):
            if units and arrivals[key] <= clock:
                after = (*left[:key], units - 1, *left[key + 1 :])
                best = min(best, (clock + 1) * (units == 1) + least(clock + 1, after))
        return best

    result = serve(ShortestRemaining(PURE), tasks, {key: cost for key, (_, cost) in enumerate(given_tasks)})
    assert turnaround(result, tasks) == least(0, tuple(cost for _, cost in given_tasks)) - sum(arrivals)


def test_shortest_remaining_interrupts_and_shortest_job_first_does_not():
    tasks = [Task(key="long", predicted=5), Task(key="short", arrival=1, predicted=2)]
    costs = {"long": 5, "short": 2}
    assert serve(ShortestRemaining(PURE), tasks, costs).order == ["short", "long"]
    tasks = [Task(key="long", predicted=5), Task(key="short", arrival=1, predicted=2)]
    assert serve(ShortestRemaining(PURE), tasks, costs, preemptive=False).order == ["long", "short"]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=6))
@settings(max_examples=100)
def test_earliest_deadline_meets_the_deadlines_of_every_feasible_set_of_unit_tasks(given_tasks):
    """Horn 1974: if any schedule meets them all, this one does. A matching of tasks to slots says whether one does."""
    tasks = [Task(key=key, arrival=first, deadline=first + room) for key, (first, room) in enumerate(given_tasks)]
    slots = {}

    def place(key, seen):
        arrival, room = given_tasks[key]
        for slot in range(arrival, arrival + room):
            if slot not in seen:
                seen.add(slot)
                if slot not in slots or place(slots[slot], seen):
                    slots[slot] = key
                    return True
        return False

    feasible = all(place(key, set()) for key in range(len(given_tasks)))
    result = serve(EarliestDeadline(), tasks, {task.key: 1 for task in tasks})
    assert all(result.ended[task.key] <= task.deadline for task in tasks) == feasible


def test_without_a_deadline_a_task_has_that_of_the_horizon():
    policy = EarliestDeadline(horizon=10)
    tasks = [Task(key="none"), Task(key="late", deadline=11), Task(key="early", deadline=9)]
    assert serve(policy, tasks, dict.fromkeys(("none", "late", "early"), 1)).order == ["early", "none", "late"]


@pytest.mark.parametrize("quantum, order", [(1, "bca"), (2, "bca"), (3, "bac"), (5, "abc")])
def test_round_robin_takes_turns(quantum, order):
    tasks = [Task(key=key) for key in "abc"]
    result = serve(TimeSlicing(quantum), tasks, {"a": 5, "b": 2, "c": 4})
    assert "".join(result.order) == order
    if quantum == 2:
        assert "".join(result.sequence) == "aabbccaacca"


def test_round_robin_of_equal_tasks_gives_each_its_turn_in_every_round():
    tasks, costs = at_once([6] * 5)
    sequence = serve(TimeSlicing(2), tasks, costs).sequence
    assert sequence == [key for _ in range(3) for key in range(5) for _ in range(2)]


def test_feedback_serves_what_is_new_and_short_before_what_is_long():
    tasks = [Task(key="long"), Task(key="short", arrival=10)]
    result = serve(MultiLevelFeedback((2, 4, 8), boost=PURE), tasks, {"long": 30, "short": 2})
    assert result.ended["short"] == 12
    tasks = [Task(key="a"), Task(key="b")]
    result = serve(MultiLevelFeedback((1, 2, 4), boost=PURE), tasks, {"a": 9, "b": 9})
    assert "".join(result.sequence) == "abaabbaaaabbbbaabb"


def test_a_boost_brings_all_back_into_the_first_line():
    policy = MultiLevelFeedback((1, 2), boost=4)
    first, second = Task(key=1), Task(key=2)
    policy.arrive(first)
    policy.arrive(second)
    for _ in range(3):
        policy.serve(policy.first(), 1)
    assert (policy.level(first), policy.level(second)) == (1, 1)
    policy.serve(policy.first(), 1)
    assert (policy.level(first), policy.level(second)) == (0, 0)
    policy.check_invariants()
    assert policy.first() is second, "the first had used up its turn"


def test_priority_is_by_level_then_by_age_and_age_makes_up_for_levels():
    tasks = [Task(key="low", priority=2), Task(key="high", priority=0), Task(key="later", priority=0, arrival=1)]
    costs = {"low": 1, "high": 2, "later": 1}
    assert serve(AgedPriority(), tasks, costs).order == ["high", "later", "low"]
    tasks = [Task(key="low", priority=2, arrival=0)]
    tasks += [Task(key=number, arrival=number) for number in range(30)]
    result = serve(AgedPriority(patience=5), tasks, {"low": 1, **dict.fromkeys(range(30), 1)})
    assert result.ended["low"] == 11, "after patience · priority units, nobody who arrives overtakes"


@pytest.mark.parametrize("policy", [AgedPriority(PURE), ShortestRemaining(PURE)])
def test_without_aging_a_task_starves_and_the_bound_says_so(policy):
    tasks = [Task(key="starving", priority=1, predicted=2)]
    tasks += [Task(key=number, arrival=number, predicted=1) for number in range(200)]
    result = serve(policy, tasks, {"starving": 2, **dict.fromkeys(range(200), 1)})
    assert result.order[-1] == "starving"
    assert result.bounds["starving"] == math.inf


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_name_and_a_finite_bound(name):
    policy = make_policy(name)
    assert type(policy) is POLICIES[name] and make_policy(policy) is policy
    tasks, costs = at_once([3, 5, 1, 4], deadline=50)
    result = serve(policy, tasks, costs)
    assert sorted(result.order) == [0, 1, 2, 3]
    assert all(0 < bound < math.inf for bound in result.bounds.values())


@pytest.mark.parametrize("name", ["FCFS", "", None, 3, FirstComeFirstServed])
def test_an_unknown_policy_is_refused_by_name(name):
    with pytest.raises(UnknownPolicy, match="one of fcfs, round_robin, srpt"):
        make_policy(name)


def test_a_policy_in_use_is_not_shared():
    policy = FirstComeFirstServed()
    policy.arrive(Task(key=1))
    with pytest.raises(ValueError, match="somebody else"):
        make_policy(policy)


@pytest.mark.parametrize("priority", [-1, -0.5, math.nan, math.inf, 10**400, "high", None])
def test_a_priority_is_a_number_from_0_on(priority):
    with pytest.raises(InvalidPriority, match="finite number ≥ 0"):
        Task(key=1, priority=priority)


@pytest.mark.parametrize("deadline", [4, 5, -math.inf, math.nan, None, "soon"])
def test_a_deadline_is_later_than_the_arrival(deadline):
    with pytest.raises(DeadlinePassed, match="arrives at 5"):
        Task(key=1, arrival=5, deadline=deadline)


NO_NUMBERS = [("arrival", value) for value in (math.nan, math.inf, "now")]
NO_NUMBERS += [("predicted", value) for value in (-1, math.nan, math.inf, 10**400, "long")]


@pytest.mark.parametrize("field, value", NO_NUMBERS)
def test_other_numbers_are_numbers(field, value):
    with pytest.raises(InvalidTask, match=field):
        Task(key=1, **{field: value})


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, "much", None])
def test_a_weight_is_above_0(weight):
    with pytest.raises(InvalidWeight, match="weight of tenant 'a'"):
        FairShare({"a": weight})


def test_a_tenant_without_weight_and_a_task_without_prediction_are_refused_and_change_nothing():
    for policy, task, error, message in (
        (FairShare({"a": 1, "b": 2}), Task(key=7, tenant="c"), UnknownTenant, "'c', who has no weight.*'a', 'b'"),
        (ShortestRemaining(), Task(key=7), UnknownCost, "task 7 has no predicted cost"),
    ):
        with pytest.raises(error, match=message):
            policy.arrive(task)
        assert not policy.num_tasks and not len(policy)
        policy.check_invariants()
    with pytest.raises(ValueError, match="got none"):
        FairShare({})


@pytest.mark.parametrize(
    "make",
    [
        lambda value: TimeSlicing(value),
        lambda value: MultiLevelFeedback((1, value)),
        lambda value: MultiLevelFeedback((1, 2), boost=value),
        lambda value: AgedPriority(value),
        lambda value: ShortestRemaining(value),
        lambda value: EarliestDeadline(value),
    ],
)
@pytest.mark.parametrize("value", [0, -1, math.nan, "long", None])
def test_lengths_and_patience_are_above_0(make, value):
    with pytest.raises(ValueError, match="number above 0"):
        make(value)


def test_lines_are_needed():
    with pytest.raises(ValueError, match="got none"):
        MultiLevelFeedback(())


@pytest.mark.parametrize("name", POLICIES)
def test_who_is_not_there_cannot_move(name):
    policy, task, stranger = make_policy(name), Task(key="a", predicted=1), Task(key="b", predicted=1)
    policy.arrive(task)
    with pytest.raises(ValueError, match="'a' has arrived already"):
        policy.arrive(task)
    for move in (policy.admit, policy.preempt, policy.remove, lambda task: policy.serve(task, 1)):
        with pytest.raises(LookupError, match="'b'"):
            move(stranger)
    for move in (policy.preempt, lambda task: policy.fork(task, stranger)):
        with pytest.raises(LookupError, match="does not run"):
            move(task)
    policy.admit(task)
    with pytest.raises(LookupError, match="not in the line"):
        policy.admit(task)
    policy.check_invariants()
    policy.remove(task)
    assert not policy.num_tasks
    policy.check_invariants()


@pytest.mark.parametrize("name", POLICIES)
def test_a_fork_comes_behind_its_parent_and_before_whoever_came_later(name):
    policy, (parent, child, later) = make_policy(name), (Task(key=key, predicted=4, deadline=9) for key in "pcl")
    policy.arrive(parent)
    policy.admit(parent)
    policy.serve(parent, 1)
    policy.arrive(later)
    policy.serve(parent, 2)
    child.done = parent.done
    policy.fork(parent, child)
    assert policy.order([later, child, parent]) == [parent, child, later]
    assert policy.victim([parent, child]) is child
    policy.admit(later)
    for task in (later, child, parent):
        policy.preempt(task)
        policy.check_invariants()
    assert list(policy) == [parent, child, later]
