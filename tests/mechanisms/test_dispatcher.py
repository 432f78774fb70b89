"""Health, retry budget and loads: thresholds to the request, bounds in every stretch, counters that add up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.balancing import (
    Dispatcher,
    Feedback,
    Health,
    HealthRule,
    LeastLoaded,
    NoTarget,
    RetryBudget,
    RoundRobin,
)

NEVER = HealthRule(max_failures=10**9)


def test_failures_in_a_row_pause_and_a_trial_brings_back():
    health = Health(HealthRule(max_failures=3, pause=10))
    for now in (0, 1):
        health.failed(now)
    health.succeeded()
    for now in (2, 3):
        health.failed(now)
        assert health.takes_requests(now, unanswered=5), "two in a row are not three"
    health.failed(4)
    assert [health.takes_requests(now, 0) for now in (4, 14, 14.001)] == [False, False, True]
    assert [health.state(now) for now in (4, 14.001)] == ["paused", "on trial"]
    assert not health.takes_requests(15, unanswered=1), "one at a time"
    health.failed(20)
    assert health.state(29) == "paused", "a trial that fails begins another pause"
    health.succeeded()
    assert health.state(29) == "up" and health.takes_requests(29, unanswered=9)
    health.check_invariants()


def test_checks_need_so_many_in_a_row():
    health = Health(HealthRule(fall=3, rise=2, begins_healthy=False))
    states = []
    for passed in (True, False, True, True, False, False, True, False, False, False, True, True):
        health.checked(passed)
        health.check_invariants()
        states.append(health.takes_requests(0, 0))
    assert states == [False] * 3 + [True] * 6 + [False] * 2 + [True]


def test_checks_that_bring_back_end_a_pause_and_draining_beats_all():
    health = Health(HealthRule(max_failures=1, pause=100, fall=1, rise=1))
    health.failed(0)
    health.checked(False)
    assert health.state(1) == "unhealthy"
    health.checked(True)
    assert health.state(1) == "up", "it was looked at since"
    health.draining = True
    assert health.state(1) == "draining" and not health.takes_requests(1, 0)


@pytest.mark.parametrize("rule", [{"max_failures": 0}, {"fall": 0}, {"rise": 0}, {"pause": -1}, {"pause": math.inf}])
def test_rules_out_of_range(rule):
    with pytest.raises(ValueError, match="thresholds are 1 or more"):
        HealthRule(**rule)


def test_a_budget_is_a_share():
    budget = RetryBudget(ratio=0.2, per_second=0, most=1)
    allowed = 0
    for _ in range(1000):
        budget.request()
        allowed += budget.take(0)
    assert allowed == budget.retries == 200 and budget.refused == 800
    assert not RetryBudget(0, 0, 0).take(0)
    for bad in ({"ratio": -1}, {"per_second": math.inf}, {"most": math.nan}):
        with pytest.raises(ValueError, match="finite and not negative"):
            RetryBudget(**bad)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=80), st.integers(0, 5), st.floats(0, 2))
def test_a_budget_holds_in_every_stretch(events, most, per_second):
    budget, now, done = RetryBudget(0.3, per_second, most), 0.0, []
    for is_request, pause in events:
        now += pause
        if is_request:
            budget.request()
        done.append((now, is_request, not is_request and budget.take(now)))
        budget.check_invariants()
    for start in range(len(done)):
        requests = retries = 0
        for at, is_request, retried in done[start:]:
            requests, retries = requests + is_request, retries + retried
            since = done[start - 1][0] if start else done[0][0]
            assert retries <= most + 0.3 * requests + per_second * (at - since) + 1e-6


def test_load_counts_at_dispatch_and_each_step_counts_once():
    dispatcher = Dispatcher(LeastLoaded(), 3, rule=NEVER)
    sent = [dispatcher.dispatch(None, 0) for _ in range(6)]
    assert dispatcher.in_flight == dispatcher.unanswered == [2, 2, 2]
    for _ in range(3):
        sent[0].began()
    assert dispatcher.unanswered == [1, 2, 2] and dispatcher.in_flight == [2, 2, 2]
    for _ in range(3):
        sent[0].ended()
        sent[0].failed(1)
        sent[0].began()
        sent[1].failed(1)
    assert dispatcher.unanswered == dispatcher.in_flight == [1, 1, 2]
    dispatcher.check_invariants()


def test_who_failed_in_the_middle_of_an_answer_has_failed():
    dispatcher = Dispatcher(RoundRobin(), 1, rule=HealthRule(max_failures=1, pause=5))
    request = dispatcher.dispatch(None, 0)
    request.began()
    request.failed(1)
    with pytest.raises(NoTarget):
        dispatcher.dispatch(None, 2)
    trial = dispatcher.dispatch(None, 6.1)
    with pytest.raises(NoTarget):
        dispatcher.dispatch(None, 6.2)
    trial.ended()  # its client left: nobody knows more, and the next one is the trial
    assert dispatcher.loads(6.3) == [0]


def test_a_stream_from_before_the_failure_does_not_hold_up_the_trial():
    dispatcher = Dispatcher(RoundRobin(), 1, rule=HealthRule(max_failures=1, pause=5))
    stream, broken = dispatcher.dispatch(None, 0), dispatcher.dispatch(None, 0)
    stream.began()
    broken.failed(1)
    assert dispatcher.loads(2) == [math.inf] and dispatcher.loads(7) == [1]


def test_targets_come_and_windows_are_told_of_who_is_out():
    class Told(RoundRobin):
        windows = []

        def observe(self, loads):
            self.windows.append(list(loads))

    dispatcher = Dispatcher(Told(), window=3)
    with pytest.raises(NoTarget):
        dispatcher.dispatch(None, 0)
    assert [dispatcher.add() for _ in range(2)] == [0, 1]
    for _ in range(2):
        dispatcher.dispatch(None, 0).ended()
    assert dispatcher.add() == 2
    dispatcher.health[0].draining = True
    assert dispatcher.dispatch(None, 0, without={1}).target == 2
    assert Told.windows == [[math.inf, 1, 1]]
    dispatcher.check_invariants()
    with pytest.raises(ValueError, match="window ≥ 1"):
        Dispatcher(RoundRobin(), window=0)
    with pytest.raises(ValueError, match="made for 2 targets"):
        Dispatcher(Feedback(2, 0.1), 3).dispatch([0, 0], 0)


@given(st.lists(st.tuples(st.sampled_from(["dispatch", "began", "ended", "failed", "drain"]), st.integers(0, 30))))
def test_whatever_happens_the_books_are_in_order(events):
    dispatcher, sent, open_ = Dispatcher(RoundRobin(), 3, window=4, rule=HealthRule(1, 2.0)), [], set()
    for now, (event, which) in enumerate(events):
        if event == "drain":
            dispatcher.health[which % 3].draining ^= True
        elif event == "dispatch":
            try:
                sent.append(dispatcher.dispatch(None, now))
                open_.add(sent[-1])
            except NoTarget:
                assert set(dispatcher.loads(now)) == {math.inf}
        elif sent:
            request = sent[which % len(sent)]
            getattr(request, event)(*[now] * (event == "failed"))
            if event != "began":
                open_.discard(request)
        dispatcher.check_invariants()
        assert dispatcher.in_flight == [sum(one.target == target for one in open_) for target in range(3)]
