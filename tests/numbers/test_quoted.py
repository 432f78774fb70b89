import pytest

from minilib.numbers import quoted
from minilib.numbers.machine import Machine


def test_every_quoted_figure_has_unit_year_and_source():
    data = quoted._read()
    for group in quoted.GROUPS:
        for name, entry in data[group].items():
            assert set(entry) == {"value", "unit", "year", "what", "source"}, f"{group}/{name}"
            assert entry["source"].startswith("https://")
            assert entry["value"] > 0 and 2000 < entry["year"] < 2100
    assert set(data) == {*quoted.GROUPS, "latency", "model", "run"}


def test_the_latency_table_is_in_order_and_sourced():
    rows = quoted.latency()
    assert len(rows) == 14
    assert [y2012 for _, _, _, y2012 in rows] == sorted(y2012 for _, _, _, y2012 in rows)
    assert quoted._read()["latency"]["source_2012"].startswith("https://")


def test_a_published_run_took_more_hours_than_its_products_at_the_peak():
    runs = quoted.runs()
    assert [run.year for run in runs] == sorted(run.year for run in runs) and len(runs) == 6
    for run in runs:
        assert run.source.startswith("https://") and run.what
        peak = Machine.datasheet(run.gpu).peak("bf16")
        share = 6 * run.parameters * run.tokens / (3600 * run.hours * peak)
        assert 0.2 < share < 0.4, run.title  # a slip of a digit leaves this band
        assert all(share < end < 0.5 for end in getattr(run, "running", []))


@pytest.mark.parametrize("name", ["llama-3-70b", "llama-3-8b"])
def test_a_model_has_the_parameters_that_its_shape_implies(name):
    m = quoted.model(name)
    attention = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
    layer = attention + 3 * m.hidden * m.intermediate + 2 * m.hidden
    total = m.layers * layer + 2 * m.vocabulary * m.hidden + m.hidden
    assert total == pytest.approx(m.parameters, rel=1e-3)


def test_a_mixture_has_the_parameters_that_its_shape_implies():
    m = quoted.model("mixtral-8x7b")
    attention = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
    for published, experts in ((m.parameters, m.experts), (m.active_parameters, m.top_k)):
        layer = attention + m.hidden * (3 * m.intermediate * experts + m.experts + 2)
        total = m.layers * layer + 2 * m.vocabulary * m.hidden + m.hidden
        assert total == pytest.approx(published, rel=1e-3)


def test_what_is_not_quoted_says_what_is():
    with pytest.raises(quoted.NotQuoted, match="nvme_read"):
        quoted.value("storage", "floppy")
    with pytest.raises(quoted.NotQuoted, match="no such group"):
        quoted.value("weather", "rain")


def test_the_table_carries_sources():
    assert all(row[-1].startswith("https://") for row in quoted.table("rental", "storage").rows)
