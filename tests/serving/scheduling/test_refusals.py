"""What a policy cannot schedule is refused by name, and whoever is being served does not notice."""

import math

import pytest

from minilib.mechanisms.scheduling import DeadlinePassed, FairShare, FirstComeFirstServed, UnknownPolicy, UnknownTenant
from minilib.serving.request import InvalidRequest, SchedulingParams
from tests.serving.scheduling.policies import NoModel, greedy
from tests.serving.served import Results, finish

WRONG = {
    "priority": [-1, -0.5, math.nan, math.inf, "high", None, 10**400],
    "tenant": [None, 3, b"a"],
    "predicted_tokens": [0, -1, 2.5, "long", True],
    "deadline": [math.nan, None, "soon"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_parameters_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=name):
        SchedulingParams(**{name: value})


@pytest.mark.parametrize(
    "scheduling, cause, message",
    [
        (SchedulingParams(tenant="a", deadline=7), DeadlinePassed, "deadline of 'wrong' is 7, and it arrives at 7"),
        (SchedulingParams(tenant="a", deadline=-math.inf), DeadlinePassed, "deadline"),
        (SchedulingParams(tenant="nobody"), UnknownTenant, "tenant 'nobody', who has no weight.*'a'"),
        (SchedulingParams(), UnknownTenant, "tenant '', who has no weight"),
        (SchedulingParams(tenant="a", predicted_tokens=10**400), None, "predicted cost of 'wrong'"),
    ],
)
def test_what_a_policy_cannot_schedule_is_refused_and_nobody_notices(scheduling, cause, message):
    served = NoModel(20, 4, policy=FairShare({"a": 1}), clock=lambda: 7)
    served.add_request("right", [1, 2], greedy(5), SchedulingParams(tenant="a", deadline=8))
    served.step()
    with pytest.raises(InvalidRequest, match=message) as caught:
        served.add_request("wrong", [1, 2], greedy(5), scheduling)
    assert cause is None or isinstance(caught.value.__cause__, cause)
    served.check_invariants()
    assert list(served.requests) == ["right"]
    results = finish(served, Results())
    assert len(results.tokens["right", 0]) == 4
    served.add_request("wrong", [1, 2], greedy(5), SchedulingParams(tenant="a"))  # the name is free
    finish(served)


@pytest.mark.parametrize("policy", ["lifo", "", 3, None, FirstComeFirstServed])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(UnknownPolicy, match="fcfs, round_robin, srpt, feedback, priority, fair_share, deadline"):
        NoModel(4, 4, policy=policy)


def test_two_engines_do_not_share_a_policy_in_use():
    policy = FirstComeFirstServed()
    served = NoModel(4, 4, policy=policy)
    served.add_request("a", [1], greedy(2))
    with pytest.raises(ValueError, match="make a policy for each"):
        NoModel(4, 4, policy=policy)
    finish(served)
