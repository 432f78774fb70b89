import time
from types import SimpleNamespace

import pytest

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


def test_a_slow_function_gets_its_least_number_of_samples_and_no_more():
    calls = []
    m = measure(lambda: (calls.append(1), time.sleep(0.02)), budget=0.01, min_samples=3)
    assert len(m.samples) == 3
    assert m.calls_per_sample == 1
    assert len(calls) == 3 + 1  # one warm-up, which alone outlasts a tenth of the budget


def test_a_fast_function_is_called_many_times_per_sample():
    m = measure(lambda: None, budget=0.05)
    assert m.calls_per_sample > 100
    assert m.seconds < 1e-5


def test_a_sleep_takes_as_long_as_it_sleeps():
    m = measure(lambda: time.sleep(0.01), budget=0.05)
    assert 0.01 <= m.seconds < 0.05


def test_compare_alternates_and_finds_the_slower_one():
    order = []
    result = compare(
        lambda: (order.append("a"), time.sleep(0.02)), lambda: (order.append("b"), time.sleep(0.01)), budget=0.1
    )
    counted = order[order.index("b") + 1 :]  # after one warm-up each
    assert counted == ["a", "b"] * (len(counted) // 2)
    assert 1.2 < result.ratio < 3.5
    assert len(result.ratios) == len(result.a.samples) == len(result.b.samples)


def test_several_functions_are_measured_in_turns():
    order = []
    fns = {name: lambda name=name: (order.append(name), time.sleep(0.005)) for name in ("a", "b", "c")}
    found = measure_in_turns(fns, budget=0.01, min_turns=4)
    assert list(found) == ["a", "b", "c"]
    assert order[-12:] == ["a", "b", "c"] * 4
    assert all(len(m.samples) == 4 and m.seconds >= 0.005 for m in found.values())
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_in_turns({})


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
