"""Intervals against figures from their papers, a simulation that knows no formula, and a search for the best one."""

import math
import random

import pytest

from minilib.operations.goodput.interval import (
    CheckpointCosts,
    ImpossibleCosts,
    ImpossibleInterval,
    availability_interval,
    best_interval,
    daly_interval,
    expected_goodput,
    expected_segment_seconds,
    first_order_overhead,
    young_interval,
)

LLAMA = 54 * 86400 / 419  # seconds between unexpected interruptions


@pytest.mark.parametrize(
    "save, interval, overhead", [(5, 334, 0.030), (30, 817, 0.073), (60, 1156, 0.104), (300, 2585, 0.232)]
)
def test_young_at_the_failure_rate_of_llama_3(save, interval, overhead):
    costs = CheckpointCosts(save, 0, LLAMA)
    assert young_interval(costs) == pytest.approx(interval, abs=1)
    assert first_order_overhead(young_interval(costs), costs) == pytest.approx(overhead, abs=5e-4)
    late = first_order_overhead(young_interval(costs), CheckpointCosts(save, 600, LLAMA))
    assert late - overhead == pytest.approx(0.054, abs=1e-3)


def lives(interval: float, costs: CheckpointCosts, failures: int, seed: int) -> float:
    """Goodput of a job that is played second by second of its events, without any formula."""
    draw, wall, durable = random.Random(seed), 0.0, 0
    for _ in range(failures):
        wall += (life := draw.expovariate(1 / costs.mtbf))
        now, saved = 0.0, 0
        while True:
            now += interval + costs.save
            if now + costs.write > life:
                break
            saved += 1
        durable += saved
        while costs.failing_restarts and (until := draw.expovariate(1 / costs.mtbf)) < costs.restart:
            wall += until  # the restart itself is interrupted
        wall += costs.restart
    return durable * interval / wall


@pytest.mark.parametrize("costs", [
    CheckpointCosts(5, 0, 1000), CheckpointCosts(30, 200, 1000), CheckpointCosts(2, 100, 600, write=60),
    CheckpointCosts(400, 50, 300), CheckpointCosts(0, 900, 600, write=30),
    CheckpointCosts(5, 400, 600, write=30, failing_restarts=False),
])  # fmt: skip
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_exact_expectation_is_what_a_simulation_gives(costs, factor):
    interval = factor * max(best_interval(costs), 20.0)
    runs = [lives(interval, costs, 4000, seed) for seed in range(8)]
    mean = sum(runs) / len(runs)
    error = math.sqrt(sum((run - mean) ** 2 for run in runs) / 7 / 8)
    assert abs(mean - expected_goodput(interval, costs)) < 5 * error


def test_without_writes_the_exact_expectation_is_dalys():
    costs = CheckpointCosts(30, 600, 11134)
    daly = 11134 * math.exp(600 / 11134) * (math.exp((817 + 30) / 11134) - 1)
    assert expected_segment_seconds(817, costs) == pytest.approx(daly, rel=1e-12)


@pytest.mark.parametrize("save", [0.01, 1, 30, 300, 3000, 30000])
@pytest.mark.parametrize("mtbf", [60, 11134, 1e6])
def test_the_best_interval_is_best_and_daly_comes_near(save, mtbf):
    costs = CheckpointCosts(save, 100, mtbf)
    best = best_interval(costs)
    goodput = expected_goodput(best, costs)
    assert all(expected_goodput(best * factor, costs) <= goodput for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2))
    if save < mtbf / 2:
        daly, young = (abs(found(costs) / best - 1) for found in (daly_interval, young_interval))
        assert daly <= young and daly < 0.02
    assert daly_interval(costs) <= mtbf


def test_the_optimum_is_flat():
    """Twice too long or too short costs about a quarter of the overhead, not of the goodput."""
    costs = CheckpointCosts(1, 0, 1e6)
    best = young_interval(costs)
    for factor in (0.5, 2):
        more = first_order_overhead(best * factor, costs) / first_order_overhead(best, costs)
        assert more == pytest.approx(1.25, abs=1e-9)


def test_the_availability_form_has_the_save_in_its_period():
    costs = CheckpointCosts(30, 600, 11134)
    period = availability_interval(costs) + 30
    assert period == pytest.approx(30 + math.sqrt(2 * (11134 + 600) * 30 + 900))

    def availability(p):
        return (1 - 30 / p) * 11134 / (11134 + 600 + p / 2)

    assert all(availability(period) > availability(period * factor) for factor in (0.99, 1.01))


def test_asynchronous_saves_are_never_closer_than_their_writes_take():
    costs = CheckpointCosts(0.01, 60, 1000, write=40)
    for interval in (young_interval, daly_interval, availability_interval, best_interval):
        assert interval(costs) == 40
    fast = CheckpointCosts(0.01, 60, 1000)
    assert best_interval(fast) < 5 and expected_goodput(40, fast) > expected_goodput(40, costs)
    with pytest.raises(ImpossibleInterval, match="each takes 40 s to write"):
        expected_goodput(39, costs)


def test_edges():
    free = CheckpointCosts(0, 0, 100)
    assert best_interval(free) == young_interval(free) == 0
    assert expected_goodput(1e-9, free) == pytest.approx(1)
    assert expected_segment_seconds(1e9, free) == math.inf and expected_goodput(1e9, free) == 0
    assert daly_interval(CheckpointCosts(200, 0, 100)) == 100
    for bad in (-1, math.nan, math.inf):
        for name in ("save", "restart", "write", "mtbf"):
            with pytest.raises(ImpossibleCosts, match=f"^{name} is a time in seconds"):
                CheckpointCosts(**{"save": 1, "restart": 1, "mtbf": 1, name: bad})
    with pytest.raises(ImpossibleCosts, match="mtbf"):
        CheckpointCosts(1, 1, 0)
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ImpossibleInterval, match="positive and finite"):
            first_order_overhead(bad, free)
