"""Nobody starves in the engine, no work is lost for ever, and tenants get their shares."""

import math

import pytest

from minilib.mechanisms.scheduling import AgedPriority, FairShare, Load, ShortestRemaining
from minilib.serving.request import SchedulingParams
from minilib.serving.sequence import OUTPUT_UNITS, PROMPT_UNITS
from tests.serving.scheduling.policies import (
    POLICIES,
    TENANTS,
    NoModel,
    counted,
    drawn,
    greedy,
    numbers,
    request_of,
)
from tests.serving.served import Results, assert_idle, finish

MAX_SEQUENCES = 3
MOST_OTHERS = 7  # sequences of others that are unfinished at a time
LONGEST_PROMPT, MOST_TOKENS = 12, 8
LARGEST = PROMPT_UNITS * LONGEST_PROMPT + OUTPUT_UNITS * MOST_TOKENS
# Who was admitted runs to its end, so all that run may receive all of their work between two decisions.
LOAD = Load(MOST_OTHERS, 2 * 30 + LARGEST, MAX_SEQUENCES * LARGEST, len(TENANTS))


class Waits:
    """Units that others received while a request received none, and what its policy had promised."""

    def __init__(self, served):
        self.served, self.waited, self.bounds = served, {}, {}
        served.scheduler.policy.serve = self._serve
        self._received = {}

    def arrived(self, request_id):
        (sequence,) = self.served.requests[request_id]
        self.waited[request_id] = 0
        self.bounds[request_id] = self.served.scheduler.policy.wait_bound(sequence, LOAD)

    def _serve(self, task, units):
        type(self.served.scheduler.policy).serve(self.served.scheduler.policy, task, units)
        self._received[task.request_id] = self._received.get(task.request_id, 0) + units

    def step(self):
        self._received = {}
        present = set(self.served.requests)
        outputs = self.served.step()
        for request_id in present:
            if request_id not in self._received:
                self.waited[request_id] += sum(self._received.values())
        return outputs

    def check(self):
        for request_id, bound in self.bounds.items():
            assert self.waited[request_id] <= bound < math.inf, request_id


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_nobody_waits_longer_than_stated_and_evict_and_readmit_ends(name, preemption):
    """Random requests on so few pages that many give way."""
    gave_way = 0
    for run in range(12):
        choices = numbers(f"{name}/{preemption}/{run}")
        served = counted(
            NoModel(
                20 + choices.randrange(8),
                1,
                choices.choice([4, 40]),
                max_batch_tokens=choices.choice([1, 4, 50]),
                max_sequences=MAX_SEQUENCES,
                preemption=preemption,
                policy=POLICIES[name](),
            )
        )
        waits, number, preempt, idle = Waits(served), 0, served.scheduler.preempt, 0

        def counting(sequence, preempt=preempt):
            nonlocal gave_way
            gave_way += 1
            preempt(sequence)

        served.scheduler.preempt = counting
        while number < 40 or served.has_unfinished:
            unfinished = sum(max(len(s.samples_due) for s in row) for row in served.requests.values())
            if number < 40 and unfinished < MOST_OTHERS - 1 and choices.random() < 0.5:
                request = request_of(choices, LONGEST_PROMPT, MOST_TOKENS)
                served.add_request(str(number), *request, drawn(choices, served.clock()))
                waits.arrived(str(number))
                number += 1
            before = served.clock()
            waits.step()
            served.check_invariants()
            idle = 0 if served.clock() > before else idle + 1
            assert idle < 100, "work is thrown away and done again for ever"
        assert_idle(served)
        waits.check()
    assert gave_way > 20


BETTER = {
    "priority": {"priority": 0},
    "srpt": {"predicted_tokens": 1},
    "deadline": {},  # a deadline that is always near
    "fair share": {"tenant": "b"},
    "fcfs": {},
    "round robin": {},
    "feedback": {},
}


def flood(policy, better, steps):
    """One request that looks worse than an endless stream of others; how long it waited, and its bound."""
    served = counted(NoModel(60, 1, max_sequences=MAX_SEQUENCES, policy=policy))
    waits, number, done = Waits(served), 0, False
    worse = SchedulingParams(priority=3, predicted_tokens=30, tenant="a", deadline=90)
    for step in range(steps):
        while len(served.requests) < MOST_OTHERS - 1:
            options = {"deadline": served.clock() + 4} if better == {} else better
            served.add_request(f"better {number}", [1] * 4, greedy(3), SchedulingParams(**options))
            number += 1
            waits.arrived(f"better {number - 1}")
            if step == 0 and number == 3:
                served.add_request("worse", [1] * 4, greedy(6), worse)
                waits.arrived("worse")
        done |= any(output.request_id == "worse" and output.finish_reason for output in waits.step())
        if done:
            break
    return done, waits.waited["worse"], waits.bounds["worse"]


@pytest.mark.parametrize("name", BETTER)
def test_an_endless_stream_of_better_requests_delays_one_as_long_as_stated(name):
    done, waited, bound = flood(POLICIES[name](), BETTER[name], 2000)
    assert done and waited <= bound < math.inf


@pytest.mark.parametrize("name, policy", [("priority", AgedPriority), ("srpt", ShortestRemaining)])
def test_the_same_stream_starves_the_request_if_the_policy_has_infinite_patience(name, policy):
    """So that the test above can fail."""
    bound_with_patience = flood(POLICIES[name](), BETTER[name], 2000)[2]
    done, waited, bound = flood(policy(math.inf), BETTER[name], 2000)
    assert not done and bound == math.inf and waited > bound_with_patience


@pytest.mark.parametrize("weights", [None, TENANTS])
@pytest.mark.parametrize("budget", [8, 100])
def test_backlogged_tenants_receive_their_shares_within_the_bound_of_the_paper(weights, budget):
    """Theorem of VTC: over any time in which two tenants always wait, their service differs by at most 2 U,
    U = max(PROMPT_UNITS · longest prompt, OUTPUT_UNITS · tokens that fit). Requests of c are the longest."""
    pages = 24
    served = counted(NoModel(pages, 1, max_batch_tokens=budget, max_sequences=4, policy=FairShare(weights)))
    choices, received, history, number = numbers("backlog"), dict.fromkeys(TENANTS, 0), [], 0
    serve = served.scheduler.policy.serve

    def counting(task, units):
        serve(task, units)
        received[task.tenant] += units

    served.scheduler.policy.serve = counting
    for _ in range(600):
        for tenant, longest in zip("abc", (2, 4, 12), strict=True):
            while sum(sequence.tenant == tenant for sequence in served.scheduler.waiting) < 3:
                number += 1
                prompt, tokens = [1] * choices.randint(1, longest), choices.randint(1, longest)
                served.add_request(str(number), prompt, greedy(tokens), SchedulingParams(tenant=tenant))
        served.step()
        history.append(dict(received))
    weight = weights or dict.fromkeys(TENANTS, 1)
    most = 2 * max(PROMPT_UNITS * 12, OUTPUT_UNITS * pages) / min(weight.values())
    gap = 0
    for begin in range(0, len(history), 10):
        for end in range(begin, len(history), 10):
            share = {key: (history[end][key] - history[begin][key]) / weight[key] for key in TENANTS}
            gap = max(gap, max(share.values()) - min(share.values()))
    assert 0 < gap <= most < min(share["a"] for share in history[-1:]) / 4, "or nothing is shown"


@pytest.mark.parametrize("name", POLICIES)
def test_a_cancelled_request_frees_its_pages_at_once(name):
    served = counted(NoModel(30, 1, 30, preemption="swap", max_batch_tokens=5, policy=POLICIES[name]()))
    choices = numbers(name)
    for number in range(8):
        served.add_request(str(number), [1] * 6, greedy(6, n=2), drawn(choices))
    for _ in range(6):
        served.step()
    served.scheduler.preempt(served.scheduler.running[-1])
    states = set()
    for request_id in list(served.requests):
        sequences = served.requests[request_id]
        states |= {sequence.status.value for sequence in sequences}
        served.abort(request_id)
        assert not any(sequence.table.frames for sequence in sequences)
        served.check_invariants()
    assert states == {"running", "waiting", "swapped"}
    assert_idle(served)
    assert not served.scheduler.policy.num_tasks


@pytest.mark.parametrize("name", POLICIES)
def test_who_can_never_fit_is_refused_and_whose_answer_grows_too_long_ends(name):
    served, results = counted(NoModel(10, 1, policy=POLICIES[name]())), Results()
    served.add_request("fits", [1, 2], greedy(4), SchedulingParams(tenant="a"))
    with pytest.raises(ValueError, match="the whole KV cache holds 10"):
        served.add_request("never", [1] * 11, greedy(1), SchedulingParams(tenant="a"))
    served.add_request("grows", [1] * 8, greedy(40), SchedulingParams(tenant="a"))
    finish(served, results, limit=100)
    assert results.reasons == {("fits", 0): "length", ("grows", 0): "length"}
    assert len(results.tokens["grows", 0]) == 3  # 10 slots and a last token that needs none, less the prompt
