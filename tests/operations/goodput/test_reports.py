"""Published runs beside what the simulator makes of their inputs."""

import tomllib

import pytest

from minilib.operations.goodput.failures import REPORTS
from minilib.operations.goodput.interval import CheckpointCosts, best_interval, expected_goodput
from minilib.operations.goodput.reports import price_reports, published_mttf_hours, scaled_mttf_hours


@pytest.fixture(scope="module")
def priced():
    return {row.name: row for row in price_reports(seeds=2)}


def test_five_published_runs_come_out_within_three_points_of_a_range_that_says_something(priced):
    assert {name: row.published for name, row in priced.items()} == {
        "llama_3": 0.90, "ft_hsdp_synchronous": 0.44, "ft_hsdp": 0.80, "byterobust": 0.97, "gemini_2_5": 0.967,
    }  # fmt: skip
    for row in priced.values():
        low, high = row.predicted
        assert abs(row.residual) < 0.03, row.name
        assert 0 < high - low < 0.15, row.name
        row.worse.check_invariants()
    assert [row.name for row in priced.values() if row.at_least] == ["llama_3"]


def test_one_failure_that_stops_all_is_the_exact_expectation(priced):
    for save, predicted in zip((30, 3), priced["ft_hsdp_synchronous"].predicted, strict=True):
        costs = CheckpointCosts(save, 600, 1080)
        assert predicted == pytest.approx(expected_goodput(best_interval(costs), costs), abs=0.01)


def test_what_dominates_differs(priced):
    """Restarts where everybody waits, the stall where others go on, and the saves where each step is saved."""

    def largest(name):
        return max(priced[name].worse.badput, key=priced[name].worse.badput.get)

    assert largest("ft_hsdp_synchronous") == largest("byterobust") == "restart"
    assert largest("ft_hsdp") == largest("gemini_2_5") == "stall"
    assert priced["byterobust"].worse.badput["lost work"] < 0.001 * priced["byterobust"].worse.wall
    assert priced["ft_hsdp"].predicted[0] > priced["ft_hsdp_synchronous"].predicted[1] + 0.2


def test_a_residual_is_the_way_to_the_range(priced):
    row = priced["ft_hsdp"]
    low, high = row.predicted

    def residual(published, at_least=False):
        return type(row)(**{**vars(row), "published": published, "at_least": at_least}).residual

    assert residual((low + high) / 2) == residual(low - 0.1, at_least=True) == 0
    assert residual(high + 0.1) == residual(high + 0.1, at_least=True) == pytest.approx(0.1)
    assert residual(low - 0.1) == pytest.approx(-0.1)


def test_two_published_rates_of_one_cluster_disagree():
    """Small jobs fail as often as 1,024 GPUs do, GPU for GPU; hosts fail as 16,384 are projected to."""
    published = published_mttf_hours()
    assert scaled_mttf_hours(1024)["from jobs of 8 GPUs"] / published[1024] == pytest.approx(1.13, abs=0.01)
    assert scaled_mttf_hours(16384)["from host failures"] == pytest.approx(published[16384], abs=0.01)
    assert scaled_mttf_hours(1024)["from host failures"] / published[1024] == pytest.approx(3.65, abs=0.01)


def test_every_figure_has_a_source_and_every_assumption_something_to_rest_on():
    reports = tomllib.loads(REPORTS.read_text(encoding="utf-8"))
    for report in (reports["llama_3"], reports["rsc"], *reports["priced"].values()):
        assert report["source"].startswith("https://arxiv.org/abs/")
    for name, report in reports["priced"].items():
        assert report["checked"] and report["rests_on"] and report["assumed"], name
        assert all(len(value) == 2 for value in report["assumed"].values())
    with pytest.raises(ValueError, match="seeds"):
        price_reports(0)
