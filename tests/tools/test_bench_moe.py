"""The benchmark of chapter 09, tried out on two ranks with a model that is trained for moments."""

import json
from dataclasses import replace

import pytest
import torch

from tools.bench import moe


def test_every_figure_is_there(monkeypatch):
    monkeypatch.setattr(moe, "BURSTS", 2)
    monkeypatch.setattr(moe, "RUNS", 1)
    found = {name: moe._http(policy) for name, policy in moe.POLICIES.items()}
    assert json.loads(json.dumps(found)) == found
    for row in found.values():
        assert 1 <= row["max_over_mean"] <= moe.BACKENDS and row["expected_max_over_mean"] > 1
        assert len(row["p99"]) == 1


def test_a_layer_on_ranks_sends_what_its_routing_says():
    rows = moe._expert_parallel(2, turns=3)
    assert [row["skew"] for row in rows] == list(moe.SKEWS)
    loads = [row["max_over_mean"] for row in rows]
    assert loads == sorted(loads) and loads[0] < 1.1 and loads[-1] > 1.5
    for row in rows:
        pairs = row["pairs"]
        assert sum(map(sum, pairs)) == 2 * moe.TOKENS * moe.LAYER.top_k
        away = pairs[0][1] + pairs[1][0]
        counts = 8 * moe.LAYER.num_experts // 2
        assert row["bytes"] == 4 * moe.WIDTH * 2 * away + counts
        assert row["predicted"] > 0 and row["seconds"] > 0


def test_training_tells_methods_and_loads(monkeypatch):
    monkeypatch.setattr(moe, "SEEDS", (0, 1))
    monkeypatch.setattr(moe, "BALANCE", {name: moe.BALANCE[name] for name in ("dense", "bias")})
    monkeypatch.setattr(moe, "TRAIN", replace(moe.TRAIN, steps=3, batch_size=2, context=32, validation_batches=1))
    tokens = torch.arange(1000) % moe.VOCABULARY
    monkeypatch.setattr(moe, "_data", lambda: [tokens, tokens])
    rows = list(moe._training())
    assert [(row["method"], row["seed"]) for row in rows] == [("dense", 0), ("dense", 1), ("bias", 0), ("bias", 1)]
    assert all(row["validation_loss"] > 0 for row in rows)
    dense, mixture = rows[0], rows[2]
    assert dense["parameters"] == dense["active_parameters"] < mixture["parameters"]
    assert mixture["active_parameters"] == pytest.approx(dense["active_parameters"], rel=0.02)
    assert dense["held_out_max_over_mean"] == [] and len(mixture["held_out_max_over_mean"]) == 2
