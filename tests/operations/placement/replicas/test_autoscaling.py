"""The autoscaler against the documented examples of Kubernetes, and against itself over time."""

import math

import pytest

from minilib.operations.placement.replicas.autoscaling import (
    IN_FLIGHT,
    Autoscaler,
    InvalidMetric,
    ScalingLimit,
    ScalingRules,
    desired_replicas,
    load_of,
)
from minilib.serving.asynchronous.status import EngineStatus
from minilib.serving.server.metrics import ServerMetrics
from minilib.serving.server.records import OpenRecords


def test_the_documented_examples():
    """200m against 100m doubles, 50m halves; 50 replicas at 90 % of CPU against 75 % become 60 (blog, 1.33)."""
    assert desired_replicas(3, 0.200, 0.100) == 6 and desired_replicas(4, 0.050, 0.100) == 2
    assert desired_replicas(50, 90, 75) == 60
    assert desired_replicas(5, 0.050, 0.100) == 3, "rounded up"


def test_a_ratio_within_a_tenth_of_one_changes_nothing():
    assert [desired_replicas(10, metric, 100) for metric in (90, 110)] == [10, 10]
    assert [desired_replicas(10, metric, 100) for metric in (89, 111)] == [9, 12]
    assert desired_replicas(1, 110, 100, tolerance=0) == 2


def test_no_fraction_adds_a_replica():
    """7 · 0.8 / 0.7 is 8, and 8.000000000000002 in floating point: thousandths are whole numbers."""
    assert math.ceil(7 * (0.8 / 0.7)) == 9 and desired_replicas(7, 0.8, 0.7) == 8
    for replicas in range(1, 60):
        for tenths in range(1, 30):
            exact = -(-replicas * tenths // 7)
            assert desired_replicas(replicas, tenths / 10, 0.7, tolerance=0) == exact
    rules = ScalingRules(10, most=100, window=0)
    assert Autoscaler(rules).decide(0, 3, [7, 7, 6]) == 2, "20 of 10 each, though a third of 20 is no whole number"


def test_zero_replicas():
    """From none, all requests count, and the tolerance does not."""
    assert desired_replicas(0, 0, 4) == 0 and desired_replicas(0, 1, 4) == 1 and desired_replicas(0, 9, 4) == 3
    scaler = Autoscaler(ScalingRules(4, least=0))
    assert scaler.decide(0, 0, []) == 0 and scaler.decide(15, 0, [], waiting=9) == 3
    assert scaler.decide(30, 3, [], waiting=9) == 3, "those that start have no metric: nothing more is wanted"
    assert [scaler.decide(now, 3, [0, 0, 0]) for now in (45, 329, 330)] == [3, 3, 0]


@pytest.mark.parametrize("metric", [math.nan, math.inf, -1, "3", None, True])
def test_a_metric_that_is_none(metric):
    with pytest.raises(InvalidMetric, match="metric is a finite number ≥ 0"):
        desired_replicas(1, metric, 1)
    scaler = Autoscaler(ScalingRules(1))
    with pytest.raises(InvalidMetric):
        scaler.decide(0, 2, [1, metric])
    assert scaler.decide(1, 2, [1, 1]) == 2


def test_rules_that_are_none():
    for wrong in (
        {"target": 0}, {"target": -1}, {"target": math.nan}, {"target": 1e-4}, {"target": 1, "least": -1},
        {"target": 1, "least": 3, "most": 2}, {"target": 1, "most": 0}, {"target": 1, "window": math.inf},
    ):  # fmt: skip
        with pytest.raises(InvalidMetric):
            ScalingRules(**wrong)
    for wrong in ({"pods": 0.5}, {"percent": -1}, {"period": 0}):
        with pytest.raises(InvalidMetric):
            ScalingLimit(**wrong)
    with pytest.raises(InvalidMetric):
        desired_replicas(-1, 1, 1)


def test_the_documented_limit_on_the_way_down():
    """80 replicas are to become 10, at 4 or 10 % a minute, whichever is more: 8 go, then 8 of 72, in the end 4."""
    rules = ScalingRules(1, most=100, window=0, down=ScalingLimit(pods=4, percent=10, period=60))
    scaler, wanted, history = Autoscaler(rules), 80, [80]
    while wanted > 10:
        wanted = scaler.decide(60.0 * len(history), wanted, [10 / wanted] * wanted)
        history.append(wanted)
    assert history == [80, 72, 64, 57, 51, 45, 40, 36, 32, 28, 24, 20, 16, 12, 10]
    scaler = Autoscaler(rules)
    assert [scaler.decide(now, wanted, [0.1] * wanted) for now, wanted in ((0, 80), (59, 72), (60, 72))] == [72, 72, 64]


def test_the_usual_limit_on_the_way_up():
    """Four or all of them in 15 s, whichever is more."""
    scaler, wanted, history = Autoscaler(ScalingRules(1, most=100)), 1, []
    for tick in range(5):
        wanted = scaler.decide(15.0 * tick, wanted, [100] * wanted)
        history.append(wanted)
    assert history == [5, 10, 20, 40, 80]
    scaler = Autoscaler(ScalingRules(1, most=100))
    assert scaler.decide(0, 1, [100]) == 5 and scaler.decide(14, 5, [100] * 5) == 5, "within a period no more come"
    assert scaler.decide(15, 5, [100] * 5) == 10


def test_fewer_are_wanted_once_no_more_were_for_five_minutes():
    scaler = Autoscaler(ScalingRules(1, most=100))
    assert scaler.decide(0, 10, [1] * 10) == 10
    assert [scaler.decide(now, 10, [0.5] * 10) for now in (15, 150, 299, 300)] == [10, 10, 10, 5]
    assert scaler.decide(301, 5, [2] * 5) == 10, "and more at once"


def test_replicas_without_a_metric_dampen_both_ways():
    """Of 6 wanted 3 serve: at twice the target 6 are desired, and at half of it the other 3 count as busy."""
    rules = ScalingRules(1, most=100, window=0)
    assert Autoscaler(rules).decide(0, 6, [2, 2, 2]) == 6
    assert Autoscaler(rules).decide(0, 6, [3, 3, 3]) == 9
    assert Autoscaler(rules).decide(0, 6, [0.5, 0.5, 0.5]) == 5


@pytest.mark.parametrize("load", [0, 0.3, 1, 7, 10, 33, 99.9, 250])
@pytest.mark.parametrize("start", [1, 4, 60])
def test_no_swinging_on_a_constant_load(load, start):
    """The number moves towards what the load needs, and then never again, whatever it began with."""
    scaler, wanted, history = Autoscaler(ScalingRules(3, most=100)), start, []
    for tick in range(200):
        wanted = scaler.decide(15.0 * tick, wanted, [load / wanted] * wanted)
        history.append(wanted)
    steps = [after - before for before, after in zip(history, history[1:], strict=False) if after != before]
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps)
    assert len(set(history[30:])) == 1 and 0.9 * 3 * (wanted - 1) < max(load, 0.1) <= 1.1 * 3 * wanted


def test_the_metric_is_what_our_server_exports():
    metrics = ServerMetrics(lambda: EngineStatus("ready", num_running=5, num_waiting=2, num_pages=8), OpenRecords())
    page = metrics.text("text/plain")[0].decode()
    assert load_of(page) == 7
    with pytest.raises(InvalidMetric, match="no minilib_num_requests_waiting"):
        load_of(page.replace(IN_FLIGHT[1], "other"))
    with pytest.raises(InvalidMetric):
        load_of("")
