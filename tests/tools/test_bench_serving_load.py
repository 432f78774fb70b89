"""The benchmark of chapter 13's loads, tried out with a small model and few requests."""

import json

import pytest

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.load.simulation import FittedPrice
from tools.bench import serving_load
from tools.bench.serving_load import Load

SMALL = ModelConfig(37, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=128)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "MODEL": SMALL, "REQUESTS": 12, "PROMPT": 12, "NEW": 6, "LONGEST": 60, "BATCHES": (1, 3), "PROMPTS": (4, 33),
        "REPEATS": 2, "TRIES": 2, "LOADS": (Load(0.3), Load(0.8, cv=2.0)), "ELSEWHERE": ("h100-sxm",),
    }.items():  # fmt: skip
        monkeypatch.setattr(serving_load, name, value)


def test_every_figure_is_there():
    found = serving_load.serving_load()
    assert json.loads(json.dumps(found)) == found
    assert min(found["price"].values()) >= 0 and found["capacity"] > 0
    assert found["fit"]["least"] <= found["fit"]["median"] <= found["fit"]["most"]
    assert [row["utilization"] for row in found["loads"]] == [0.3, 0.8]
    for row in found["loads"]:
        assert len(row["tries"]) == 2 and set(row["predicted_over_measured"]) == {"ttft", "itl"}
        for figures in (row["predicted"], *row["tries"]):
            assert (figures["completed"], figures["failed"]) == (12, 0)
            assert figures["ttft"]["p50"] <= figures["ttft"]["p90"] <= figures["ttft"]["p99"]
            assert 0 <= figures["slo_attainment"] <= 1 and figures["goodput"] <= figures["request_throughput"] * 1.0001
        tokens = {figures["output_tokens"] for figures in (row["predicted"], *row["tries"])}
        assert len(tokens) == 1, "the same requests"
    (low, high) = found["elsewhere"]
    assert low["machine"] == "h100-sxm" and low["predicted"]["ttft"]["p50"] < high["predicted"]["ttft"]["p90"]


def test_steps_are_of_all_kinds():
    steps = [counts for counts, seconds in serving_load.steps_alone(Decoder(SMALL).eval()) if seconds > 0]
    assert any(max(counts.counts) == 1 and len(counts.counts) == 3 for counts in steps), "decode"
    assert any(max(counts.counts) == 33 and min(counts.counts) == 1 for counts in steps), "a prompt joins"
    assert any(len(counts.counts) == 1 and counts.tokens == 33 for counts in steps), "a prompt alone"
    assert sum(counts.rows == 0 for counts in steps) == 0


def test_a_load_at_once_is_served_at_the_rate_that_steps_allow():
    """With steps of one second, requests a second are requests over steps."""
    rate = serving_load.rate_at_once(FittedPrice(1.0, 0, 0, 0, 0))
    news = [arrival.params.max_tokens for arrival in serving_load._arrivals([0.0] * 12)]
    assert 12 / sum(news) < rate <= 12 / max(news)
