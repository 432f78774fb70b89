"""Whom each policy serves first; who gives way; and how much work deciding that takes."""

import pytest

from minilib.mechanisms.scheduling import AgedPriority, FairShare, FirstComeFirstServed, ShortestRemaining, Task
from minilib.serving.request import SchedulingParams
from minilib.serving.sequence import PROMPT_UNITS, Status
from tests.mechanisms.scheduling.single_server import serve
from tests.serving.scheduling.policies import POLICIES, NoModel, counted, drawn, greedy, numbers
from tests.serving.served import Results, assert_idle, finish, step

PROMPT = [1, 2, 3]


def one_at_a_time(policy, **options):
    return counted(NoModel(64, 4, max_sequences=1, policy=policy, **options))


def order_of(served, requests):
    """Request ids in the order in which they end; requests are (id, tokens, scheduling)."""
    for request_id, tokens, scheduling in requests:
        served.add_request(request_id, PROMPT, greedy(tokens), SchedulingParams(**scheduling))
    ended = []
    while served.has_unfinished:
        ended += [output.request_id for output in served.step() if output.finish_reason]
        served.check_invariants()
    assert_idle(served)
    return "".join(ended)


ORDERS = {
    "fcfs": ("abcd", [("a", 4, {}), ("b", 1, {}), ("c", 3, {}), ("d", 1, {})]),
    "priority": ("cbda", [(key, 2, {"priority": level}) for key, level in zip("abcd", (2, 1, 0, 1), strict=True)]),
    "srpt": ("bdca", [("a", 9, {}), ("b", 1, {}), ("c", 3, {}), ("d", 2, {})]),
    "deadline": ("dbca", [("a", 2, {}), ("b", 2, {"deadline": 30}), ("c", 2, {"deadline": 50}),
                          ("d", 2, {"deadline": 9})]),
    "fair_share": ("adbc", [("a", 2, {"tenant": "x"}), ("b", 2, {"tenant": "x"}), ("c", 2, {"tenant": "x"}),
                            ("d", 2, {"tenant": "y"})]),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_requests_are_served_in_the_order_of_the_policy(name):
    order, requests = ORDERS[name]
    assert order_of(one_at_a_time(name), requests) == order


def test_predicted_tokens_are_what_the_shortest_is_chosen_by():
    requests = [("a", 9, {"predicted_tokens": 1}), ("b", 9, {"predicted_tokens": 2}), ("c", 1, {})]
    assert order_of(one_at_a_time("srpt"), requests) == "acb"


@pytest.mark.parametrize("name", POLICIES)
def test_processes_and_requests_are_served_in_the_same_order(name):
    """One policy, two worlds: an engine with room for one request, and a server that never preempts."""
    choices = numbers(name)
    given = [(number, choices.randint(1, 8), choices.randint(1, 9), drawn(choices)) for number in range(20)]
    served, ended = one_at_a_time(POLICIES[name]()), []
    for number, length, tokens, scheduling in given:
        served.add_request(str(number), PROMPT * length, greedy(tokens), scheduling)
    while served.has_unfinished:
        ended += [int(output.request_id) for output in served.step() if output.finish_reason]
    tasks, costs = [], {}
    for number, length, tokens, scheduling in given:
        cost = costs[number] = PROMPT_UNITS * 3 * length + 2 * tokens
        predicted = cost if scheduling.predicted_tokens is None else 3 * length + 2 * scheduling.predicted_tokens
        row = {"tenant": scheduling.tenant, "priority": scheduling.priority, "deadline": scheduling.deadline}
        tasks.append(Task(key=number, predicted=predicted, **row))
    assert serve(POLICIES[name](), tasks, costs, preemptive=False).order == ended


@pytest.mark.parametrize("name", ["priority", "srpt", "deadline", "fair share"])
def test_who_is_last_in_order_gives_way_and_goes_on_first_if_it_is_first(name):
    """Pages for both prompts, not for their tokens; the first to come is the last in order."""
    served = counted(NoModel(6, 1, policy=POLICIES[name]()))
    last = SchedulingParams(priority=3, predicted_tokens=30, deadline=400, tenant="a")
    first = SchedulingParams(priority=0, predicted_tokens=1, deadline=50, tenant="b")
    served.add_request("last", PROMPT, greedy(4), last)
    if name == "fair share":
        served.scheduler.policy.counters["a"] = 40  # a tenant in debt
    served.add_request("first", [4, 5], greedy(4), first)
    if name == "fair share":
        served.scheduler.policy.counters |= {"a": 40, "b": 0}
    results, gave_way = Results(), set()
    while served.has_unfinished:
        step(served, results)
        gave_way |= {sequence.request_id for sequence in served.scheduler.waiting}
    assert gave_way == {"last"}


@pytest.mark.parametrize("name", POLICIES)
def test_who_waits_evicts_nobody(name):
    """However urgent: work that is half done goes on, or urgent requests would throw away each other's."""
    served = counted(NoModel(8, 1, policy=POLICIES[name]()))
    patient = SchedulingParams(priority=3, predicted_tokens=30, deadline=900, tenant="a")
    served.add_request("patient", PROMPT, greedy(5), patient)
    served.step()
    served.add_request("urgent", [1] * 6, greedy(1), SchedulingParams(predicted_tokens=1, deadline=20, tenant="b"))
    (running,) = served.requests["patient"]
    while "patient" in served.requests:
        assert running.status is Status.RUNNING
        served.step()
    finish(served)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_who_gave_way_is_not_overtaken_by_whoever_comes_later(name, preemption):
    """Peers with the same parameters keep coming, and fill every page that becomes free."""
    served = counted(NoModel(9, 1, 20, preemption=preemption, policy=POLICIES[name]()))
    peer = SchedulingParams(tenant="a")
    served.add_request("older", PROMPT, greedy(6), peer)
    served.add_request("victim", PROMPT, greedy(6), peer)
    served.step()
    (victim,) = served.requests["victim"]
    served.scheduler.preempt(victim)
    number = 0
    while victim.status in (Status.WAITING, Status.SWAPPED):
        served.add_request(f"later {number}", [1], greedy(1), peer)
        number += 1
        served.step()
        assert not any(s.request_id.startswith("later") for s in served.scheduler.running) or number > 3
        assert number < 20, "overtaken for ever"
    finish(served)


@pytest.mark.parametrize("name", POLICIES)
def test_decoding_recovers_once_the_pages_suffice(name):
    """After a time of preemptions, everybody who is left gets a token at every step again."""
    served, recovered, gave_way = counted(NoModel(24, 1, policy=POLICIES[name]())), 0, 0
    for number in range(6):
        served.add_request(str(number), [1], greedy(10), SchedulingParams(tenant="abc"[number % 3]))
    while served.has_unfinished:
        sequences = served.scheduler.running + served.scheduler.waiting
        suffices = sum(11 for _ in sequences) <= 24  # 10 tokens each, and the prompt
        caught_up = all(s.status is Status.RUNNING and s.num_uncomputed_tokens == 1 for s in sequences)
        outputs = served.step()
        served.check_invariants()
        gave_way += len(served.scheduler.waiting)
        if suffices and caught_up:
            recovered += 1
            assert len(outputs) == len(sequences)
    assert gave_way and recovered, "it never was short of pages, or always"


class Counted(FirstComeFirstServed):
    """Counts what it computes."""

    computed = 0

    def place(self, task):
        self.computed += 1
        return super().place(task)


class CountedPriority(AgedPriority, Counted):
    pass


class CountedShortest(ShortestRemaining, Counted):
    pass


class CountedShare(FairShare, Counted):
    pass


@pytest.mark.parametrize("policy", [Counted, CountedPriority, CountedShortest, CountedShare])
def test_a_step_costs_the_same_however_many_wait(policy):
    """Of each sequence that runs, or is admitted, a few places are computed; of the others none."""
    steps = {}
    for waiting in (5, 500):
        served = NoModel(200, 16, max_sequences=4, policy=policy())
        for number in range(waiting):
            scheduling = SchedulingParams(priority=number % 3, tenant="ab"[number % 2], predicted_tokens=1 + number % 7)
            served.add_request(str(number), PROMPT, greedy(4), scheduling)
        served.step()
        before = served.scheduler.policy.computed
        served.step()
        steps[waiting] = served.scheduler.policy.computed - before
    assert steps[5] == steps[500] <= 8


@pytest.mark.parametrize("name", POLICIES)
def test_samples_of_one_prompt_stand_together(name):
    """A fork is no arrival: it has the place of its parent, before whoever came later."""
    served = counted(NoModel(64, 4, policy=POLICIES[name]()))
    same = SchedulingParams(tenant="a")
    served.add_request("forks", PROMPT, greedy(4, n=3), same)
    served.add_request("later", PROMPT, greedy(4), same)
    served.step()
    order = [(sequence.request_id, sequence.sample) for sequence in served.scheduler.running]
    if name not in ("round robin", "feedback"):  # there, whoever has used up a turn goes to the end
        assert order == [("forks", 0), ("forks", 1), ("forks", 2), ("later", 0)]
    finish(served)
