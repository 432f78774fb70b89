"""The guilty call: for each cause the right span of the right instance, for a healthy service none."""

from collections import Counter

import pytest

from minilib.classic.observed_service.guilty_call import find_guilty_call
from minilib.classic.observed_service.shop import observe
from minilib.mechanisms.telemetry import Span, Trace

GUILTY = {
    "slow replica": ("recommend", "recommend/2", "work"),
    "slow canary": ("recommend", "recommend/2", "work"),
    "lock": ("catalog", "catalog/0", "wait for lock"),
    "retry": ("front", "front/0", "retry auth"),
    "queue": ("catalog", "catalog/0", "wait for workers"),
    "pause": ("store", "store/3", "pause"),
    "slow leaves": ("store", None, "work"),
}
REQUESTS = {"slow canary": 800}


@pytest.mark.parametrize("seed", range(10, 13))
@pytest.mark.parametrize("cause", GUILTY)
def test_each_cause_is_named(cause, seed):
    found = find_guilty_call(observe(cause, REQUESTS.get(cause, 200), seed=seed).traces())
    assert (found.service, found.process, found.name) == GUILTY[cause]
    assert 0.5 < found.share < 1.2 and found.extra_ns > 20e6 and 3 <= found.slow < 100


@pytest.mark.parametrize("seed", range(12))
def test_of_a_healthy_service_nothing_is_named(seed):
    assert find_guilty_call(observe("healthy", 200, seed=seed).traces()) is None


def test_those_who_wait_for_a_lock_lead_to_the_one_that_held_it():
    observation = observe("lock", 200)
    long = {span.trace_id for span in observation.spans if span.name == "hold lock" and span.duration_ns > 50e6}
    waits = [span for span in observation.spans if span.name == "wait for lock" and span.duration_ns > 10e6]
    holders = Counter(span.attributes["holder"] for span in waits)
    assert len(long) == 4 and set(holders) <= long and len(waits) > 10


def request(number, *stretches):
    """A root whose children, (service instance, name, ns), follow one another."""
    spans, now = [], 0
    for process, name, duration in stretches:
        spans.append(Span(name, str(number), f"{number}.{len(spans)}", "root", process, now, now + duration))
        now += duration
    return Trace([Span("root", str(number), "root", None, "front/0", 0, now), *spans])


ORDINARY = [request(number, ("a/0", "work", 10), ("b/0", "work", 10)) for number in range(50)]


def test_two_that_share_the_blame_are_not_accused_and_one_with_more_is():
    both = [request(100 + number, ("a/0", "work", 60), ("b/0", "work", 60)) for number in range(5)]
    assert find_guilty_call(ORDINARY + both) is None
    more = [request(100 + number, ("a/0", "work", 60), ("b/0", "work", 80)) for number in range(5)]
    assert find_guilty_call(ORDINARY + more) == ("b", "b/0", "work", 70 / 120, 5, 70)


def test_what_is_long_in_every_request_is_not_accused_of_the_slow_ones():
    """The longest span is not the guilty one: it is as long in ordinary requests."""
    traces = [request(number, ("a/0", "work", 100), ("b/0", "work", 1)) for number in range(50)]
    traces += [request(100 + number, ("a/0", "work", 100), ("b/0", "work", 90)) for number in range(4)]
    assert find_guilty_call(traces, slow_ns=150) == ("b", "b/0", "work", 1.0, 4, 89)


def test_a_call_that_ordinary_requests_do_not_make_is_found_and_so_is_its_service():
    traces = ORDINARY + [
        request(100 + number, ("a/0", "work", 10), (f"c/{number % 3}", "retry", 90), ("b/0", "work", 10))
        for number in range(6)
    ]
    assert find_guilty_call(traces) == ("c", None, "retry", 1.0, 6, 90)


def test_too_few_requests_accuse_nobody():
    slow = request(100, ("a/0", "work", 500), ("b/0", "work", 10))
    assert find_guilty_call([]) is None is find_guilty_call([slow])
    assert find_guilty_call([*ORDINARY, slow, slow]) is None
    assert find_guilty_call([*ORDINARY, slow], fewest=1).extra_ns == 490
    assert find_guilty_call([slow] * 5, slow_ns=0) is None, "without an ordinary request there is no excess"
    with pytest.raises(ValueError, match="0 or more ns"):
        find_guilty_call([slow], slow_ns=-1)
