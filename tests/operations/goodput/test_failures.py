"""Rates per component against published counts."""

import math

import pytest

from minilib.operations.goodput.failures import (
    FailureCause,
    Fleet,
    LemonHosts,
    interruptions_per_hour,
    llama_3_interruptions,
    mtbf_seconds,
)


def test_the_counts_of_llama_3_and_the_shares_that_its_table_misprints():
    table = llama_3_interruptions()
    assert table.unexpected == 419 and table.unexpected + table.planned == 466
    assert table.share("faulty GPU") == pytest.approx(0.353, abs=5e-4)
    of_gpus = {row["name"]: row["printed_percent"] for row in table.rows if "printed_percent" in row}
    assert of_gpus["faulty GPU"] == 30.1 and sum(of_gpus.values()) == pytest.approx(58.7)
    assert table.share(*of_gpus) == pytest.approx(0.640, abs=5e-4)
    for name, printed in of_gpus.items():
        assert (abs(100 * table.share(name) - printed) < 0.06) == (name != "faulty GPU")


def test_rates_give_back_the_counts_and_the_published_interval():
    table = llama_3_interruptions()
    causes = table.causes()
    assert interruptions_per_hour(causes, table.fleet) * 54 * 24 == pytest.approx(419)
    assert mtbf_seconds(causes, table.fleet) == pytest.approx(11134, abs=2)  # 3.09 hours
    assert interruptions_per_hour(table.causes(planned=True), table.fleet) * 54 * 24 == pytest.approx(466)
    assert 419 / 54 / table.fleet.hosts * 1000 == pytest.approx(3.8, abs=0.02)  # per 1000 hosts and day


def test_twice_the_machines_fail_twice_as_often_but_not_software():
    causes = llama_3_interruptions().causes()
    hardware = [cause for cause in causes if cause.per != "job"]
    whole = mtbf_seconds(hardware, Fleet(16384))
    assert mtbf_seconds(hardware, Fleet(32768)) == pytest.approx(whole / 2)
    assert mtbf_seconds(hardware, Fleet(1024)) == pytest.approx(whole * 16)
    assert whole / 16 < mtbf_seconds(causes, Fleet(16)) < mtbf_seconds(hardware, Fleet(16))
    assert mtbf_seconds(causes, Fleet(16)) < 54 * 86400 / 63, "software alone stops a small job as often"


def test_edges():
    odd = Fleet(17, 8, 2)
    assert (odd.hosts, odd.racks, odd.count("job")) == (3, 2, 1) and Fleet(1).racks == 1
    assert mtbf_seconds([], odd) == mtbf_seconds([FailureCause("never", "gpu", 0.0)], odd) == math.inf
    with pytest.raises(ValueError, match="gpus is a whole number ≥ 1, got 0"):
        Fleet(0)
    with pytest.raises(ValueError, match="per is gpu, host, rack or job"):
        FailureCause("x", "core", 1.0)
    with pytest.raises(ValueError, match="loses one of process, host, rack"):
        FailureCause("x", "gpu", 1.0, "data centre")
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="failures per hour of x"):
            FailureCause("x", "gpu", bad)
    for bad in ({"share": 1.5}, {"share": math.nan}, {"factor": 0.5}, {"evict_after": 0}):
        with pytest.raises(ValueError):
            LemonHosts(**bad)


def test_lemons_leave_the_mean_rate_as_it_is():
    fleet, lemons = Fleet(800), LemonHosts(0.05, 20)
    assert lemons.count(fleet) == 5
    of_others = lemons.of_others(fleet)
    assert 95 * of_others + 5 * 20 * of_others == pytest.approx(fleet.hosts)
    assert LemonHosts().of_others(fleet) == 1
