"""Experiments: the same policy over HTTP and over a stream, what events do, and two choices against one."""

import asyncio
import os
import signal
import statistics
import threading

import pytest

from minilib.classic.http.backend import Backend
from minilib.classic.http.experiment import (
    exponential_work,
    poisson_arrivals,
    run_bursts,
    run_experiment,
    run_in_thread,
    simulate_experiment,
    zipf_keys,
)
from minilib.mechanisms.balancing import (
    BoundedHashing,
    Feedback,
    LeastLoaded,
    Random,
    RoundRobin,
    Sticky,
    TwoChoices,
    Weighted,
    assign,
    hash_affinity,
)
from minilib.numbers.balls_in_bins import expected_max_load
from tests.classic.http.http_cases import run

pytestmark = pytest.mark.filterwarnings("error")
SAME = {
    "sticky": lambda: Sticky(4),
    "sign": lambda: Feedback(4, rate=0.05, affinity=hash_affinity(4)),
    "proportional": lambda: Feedback(4, rate=0.1, rule="proportional", affinity=hash_affinity(4)),
    "weighted": lambda: Weighted([3, 2, 1, 1]),
    "random": lambda: Random(5),
}


def slow(factor):
    """An event that divides a backend's speed."""

    async def divide(backend):
        backend.speed /= factor

    return divide


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_requests_and_tokens_are_balanced_alike(make):
    keys, over_http, over_a_stream = zipf_keys(150, 20, 1.1, seed=1), make(), make()
    report = run_experiment(over_http, [1.0] * 4, keys, work=0.0, concurrency=1, window=16)
    assert report.counts == assign(over_a_stream, keys, 4, window=16) and report.lost == 0
    if isinstance(over_http, Feedback):
        assert over_http.bias == over_a_stream.bias and any(over_http.bias) == (over_http.rate > 0)


def test_a_report_adds_up():
    keys, works = [f"k {number}/é" for number in range(60)], exponential_work(60, 0.001)
    report = run_experiment(RoundRobin(), [1.0, 2.0], keys, work=works)
    assert report.counts == [30, 30] and report.lost == 0
    assert [report.counts_of(slice(0, 20)), report.counts_of(slice(59, None))] == [[10, 10], [0, 1]]
    for answer, work in zip(report.answers, works, strict=True):
        assert answer.latency >= answer.queued + work / (1 + answer.backend) - 1e-6
    assert report.latency.mean == pytest.approx(statistics.fmean(answer.latency for answer in report.answers))
    assert report.queueing.mean == pytest.approx(statistics.fmean(answer.queued for answer in report.answers))


def test_what_is_lost_is_counted_and_has_no_latency():
    report = run_experiment(RoundRobin(), [1.0], ["k"] * 8, work=0.0, concurrency=1, events=[(5, 0, Backend.kill)])
    assert (report.lost, report.counts, report.answers[5:]) == (3, [5], [None] * 3)
    assert report.latency.mean > 0


@pytest.mark.parametrize(
    "policy", [LeastLoaded(), TwoChoices(2), BoundedHashing(4)], ids=lambda policy: type(policy).__name__
)
def test_who_dies_and_comes_back_loses_nothing(policy):
    events = [(100, 2, Backend.kill), (250, 2, Backend.start), (300, 0, slow(4))]
    keys = zipf_keys(500, 30, 0.5, seed=3)
    report = run_experiment(policy, [1.0] * 4, keys, work=0.001, concurrency=12, events=events)
    assert report.lost == 0 and sum(report.counts) == 500
    assert report.counts_of(slice(112, 250))[2] == 0 < report.counts_of(slice(300, None))[2]


@pytest.mark.parametrize("policy", [LeastLoaded(), TwoChoices(1)], ids=["least loaded", "two choices"])
def test_who_slows_down_gets_less(policy):
    keys = [f"k{number}" for number in range(300)]
    report = run_experiment(policy, [1.0] * 4, keys, work=0.004, events=[(50, 1, slow(10))])
    late = report.counts_of(slice(150, None))
    assert report.lost == 0 and late[1] < 0.6 * sum(late) / 4


def test_blind_policies_give_a_slow_one_as_much():
    events = [(0, 1, slow(5))]
    report = run_experiment(RoundRobin(), [1.0] * 4, zipf_keys(200, 9), work=0.0005, events=events)
    assert report.counts == [50] * 4


@pytest.mark.parametrize("policy, d", [(Random(1), 1), (TwoChoices(1), 2)], ids=["random", "two choices"])
def test_bursts_are_balls_in_bins(policy, d):
    bursts = run_bursts(policy, num_backends=32, num_requests=32, bursts=12)
    assert len(bursts) == 12 and all(len(queues) == sum(queues) == 32 for queues in bursts)
    fullest = statistics.fmean(max(queues) for queues in bursts)
    assert fullest == pytest.approx(expected_max_load(32, 32, d), rel=0.15)


def test_two_choices_queue_less_than_one_whatever_the_seed():
    keys = zipf_keys(1000, 50)
    for seed in range(10):
        one, two = (
            simulate_experiment(policy, [1.0] * 4, keys, work=0.005, utilization=0.8, seed=seed)
            for policy in (Random(seed), TwoChoices(seed))
        )
        assert one.queueing.p99 > 1.5 * two.queueing.p99


def test_two_choices_queue_less_than_one_for_real():
    keys, work = zipf_keys(200, 50), 0.008
    for _ in range(3):
        one, two = (
            run_experiment(policy, [1.0] * 4, keys, work=work, utilization=0.8, seed=3)
            for policy in (Random(3), TwoChoices(3))
        )
        assert one.lost == two.lost == 0
        overhead = max(report.latency.mean - report.queueing.mean - work for report in (one, two))
        if overhead < work:
            assert one.queueing.p99 > 1.2 * two.queueing.p99, "by the backends' own clocks"
            return
    pytest.skip(f"this machine is too busy for its event loop to keep up: {overhead:.3f} s")


def test_arrivals_are_a_poisson_process_of_the_rate_that_makes_the_utilization():
    works = [0.01, 0.03] * 5000  # 0.02 s on average; 0.8 of 2.5 s of work per second are 100 requests per second
    arrivals = poisson_arrivals(0.8, works, [0.5, 2.0], seed=1)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert len(gaps) == 10_000 and min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(0.01, rel=0.03), "its mean"
    assert statistics.pstdev(gaps) == pytest.approx(0.01, rel=0.05), "an exponential distribution's deviation"


def test_a_simulation_is_the_queue_by_hand():
    for speeds in ([1.0], [0.5, 2.0]):
        works, keys = exponential_work(40, 0.01, seed=1), ["k"] * 40
        report = simulate_experiment(RoundRobin(), speeds, keys, work=works, utilization=0.9, seed=3)
        arrivals = poisson_arrivals(0.9, works, speeds, seed=3)
        assert report.counts == [40 // len(speeds)] * len(speeds) and report.lost == 0
        for target, speed in enumerate(speeds):
            wait = before = 0.0
            for number in range(target, 40, len(speeds)):  # Lindley's recursion
                wait = max(0.0, wait - (arrivals[number] - before))
                assert report.answers[number].queued == pytest.approx(wait, abs=1e-12)
                wait, before = wait + works[number] / speed, arrivals[number]


def test_zipf_is_what_zipf_says():
    keys = zipf_keys(20_000, 10, 1.0, seed=4)
    total = sum(1 / rank for rank in range(1, 11))
    for rank in range(10):
        assert keys.count(f"k{rank}") / 20_000 == pytest.approx(1 / (rank + 1) / total, rel=0.15)
    assert keys == zipf_keys(20_000, 10, 1.0, seed=4) != zipf_keys(20_000, 10, 1.0, seed=5)
    assert len(set(zipf_keys(1000, 10, 0.0))) == 10 and zipf_keys(0, 3) == []
    for wrong in ((-1, 1), (1, 0), (1, 1, -1.0)):
        with pytest.raises(ValueError, match="needs num_requests ≥ 0"):
            zipf_keys(*wrong)


def test_a_running_loop_is_no_obstacle_and_leaves_no_file():
    async def main():
        assert run_experiment(RoundRobin(), [1.0], ["k"] * 3, work=0.0).counts == [3]

    run(main)


def test_what_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr("minilib.classic.http.experiment.LIMIT", 0.1)
    with pytest.raises(TimeoutError):
        run_experiment(RoundRobin(), [1.0], ["k"] * 3, work=9.0, answer_within=30)
    with pytest.raises(TimeoutError):
        run_in_thread(lambda: asyncio.sleep(9))


def test_who_is_interrupted_leaves_nothing():
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to it
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            run_experiment(RoundRobin(), [1.0], ["k"] * 3, work=9.0, answer_within=30)
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keys": []}, "needs speeds, keys and a work for each, got 1, 0 and 0"),
        ({"work": [0.1]}, "got 1, 2 and 1"),
        ({"speeds": []}, "got 0, 2 and 2"),
        ({"concurrency": 1, "utilization": 0.5}, "takes one client or more, or a utilization"),
        ({"concurrency": 0}, "one client or more, or a utilization, got concurrency=0"),
        ({"utilization": 0.0}, "utilization > 0"),
        ({"utilization": 0.5, "work": 0}, "0.5 and 0 s of work"),
        ({"events": [(0, 1, Backend.kill)]}, "no backend 1 of 1"),
        ({"events": [(2, 0, Backend.kill)]}, "no request 2 of 2"),
    ],
)
def test_experiments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run_experiment(RoundRobin(), **{"speeds": [1.0], "keys": ["a", "b"], **options})
    with pytest.raises(ValueError, match="one of each is needed"):
        run_bursts(RoundRobin(), 0, 1)


def test_a_proxy_that_is_refused_leaves_no_backend():
    with pytest.raises(ValueError, match="window ≥ 1"):
        run_experiment(RoundRobin(), [1.0], ["k"], window=0)
