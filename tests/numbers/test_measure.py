import time
from types import SimpleNamespace

import pytest

from minilib.numbers import measure as measuring
from minilib.numbers.measure import Check, Measurement, check_table, compare, measure, measure_in_turns, median_ratio


def test_measurement_reports_median_and_quartiles():
    m = Measurement((1.0, 2.0, 3.0, 4.0, 100.0))
    assert m.seconds == 3.0
    assert m.quartiles == (2.0, 4.0)
    assert m.spread == pytest.approx(2 / 3)


def test_one_sample_has_no_spread():
    m = Measurement((5.0,))
    assert (m.seconds, m.quartiles, m.spread) == (5.0, (5.0, 5.0), 0.0)


def test_measurement_needs_a_sample():
    with pytest.raises(ValueError, match="at least one sample"):
        Measurement(())


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `sleep` moves; what is read off it is exact, however busy the machine."""
    now = SimpleNamespace(seconds=0.0)
    now.sleep = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(measuring, "Watch", lambda: SimpleNamespace(busy=0.3))
    return now


def test_a_slow_function_gets_its_least_number_of_samples_and_no_more(clock):
    calls = []
    m = measure(lambda: (calls.append(1), clock.sleep(0.02)), budget=0.01, min_samples=3)
    assert m.samples == pytest.approx([0.02] * 3)
    assert m.calls_per_sample == 1
    assert len(calls) == 3 + 1  # one warm-up, which alone outlasts a tenth of the budget


def test_a_fast_function_is_called_many_times_per_sample(clock):
    m = measure(lambda: clock.sleep(1e-6), budget=0.05)
    assert m.calls_per_sample == 1000  # a millisecond
    assert m.seconds == pytest.approx(1e-6)
    assert len(m.samples) in (50, 51)


def test_a_sleep_takes_at_least_as_long_as_it_sleeps():
    assert measure(lambda: time.sleep(0.01), budget=0.05).seconds >= 0.01


def test_compare_alternates_and_finds_the_slower_one(clock):
    order = []
    a, b = (lambda name=name, s=s: (order.append(name), clock.sleep(s)) for name, s in (("a", 0.02), ("b", 0.01)))
    result = compare(a, b, budget=0.1)
    assert order == ["a", "b"] + ["a", "b"] * 5  # after one warm-up each
    assert result.ratios == pytest.approx([2.0] * 5)
    assert len(result.a.samples) == len(result.b.samples) == 5
    assert result.busy == 0.3


def test_several_functions_are_measured_in_turns(clock):
    order = []
    fns = {name: lambda name=name: (order.append(name), clock.sleep(0.005)) for name in ("a", "b", "c")}
    found = measure_in_turns(fns, budget=0.01, min_turns=4)
    assert list(found) == ["a", "b", "c"]
    assert order[-12:] == ["a", "b", "c"] * 4
    assert all(m.samples == pytest.approx([0.005] * 4) for m in found.values())
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_in_turns({})


def test_a_measurement_knows_how_busy_others_were_and_says_so_if_it_matters(clock):
    m = measure(lambda: clock.sleep(0.1), budget=0.2)
    assert m.busy == 0.3
    assert str(m).endswith("(5 samples, others took 30% of the cores)")
    assert "others" not in str(Measurement((1.0, 2.0), busy=0.05))


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="budget"):
        measure(lambda: None, budget=budget)
    with pytest.raises(ValueError, match="budget"):
        compare(lambda: None, lambda: None, budget=budget)


def test_at_least_one_sample():
    with pytest.raises(ValueError, match="at least one"):
        measure(lambda: None, min_samples=0)


def test_an_exception_of_the_function_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0)


def test_check_table_marks_what_needs_explaining():
    def check(name, predicted, measured):
        return Check(name, SimpleNamespace(seconds=predicted, bound="memory"), Measurement((measured,)))

    checks = [check("good", 1.0, 1.2), check("slow", 1.0, 4.0), check("fast", 3.0, 1.0)]
    marks = {row[0]: row[-1] for row in check_table(checks).rows}
    assert marks == {"good": "", "slow": "explain", "fast": "explain"}
    assert median_ratio(checks) == pytest.approx(1 / 1.2)
