"""The benchmark of chapter 04, tried out on two ranks with small tensors."""

import json

import pytest

from tools.bench import collectives as bench_collectives
from tools.bench.collectives import KINDS, all_reduce_plans, collectives


def test_every_plan_over_every_transport_beside_gloo(monkeypatch):
    monkeypatch.setattr(bench_collectives, "WORLD_SIZES", (2,))
    monkeypatch.setattr(bench_collectives, "TURNS", 2)
    found = collectives(sizes=(2**12,), messages=(4, 2**12), budget=0.0)
    assert json.loads(json.dumps(found)) is not None
    assert [link["kind"] for link in found["links"]] == list(KINDS)
    assert all(
        link[rate] > 0 for link in found["links"] for rate in ("latency", "bandwidth", "reduce_rate", "bus_bandwidth")
    )
    rows = found["all_reduce"]
    combinations = {(row["kind"], row["plan"], row["bytes"]) for row in rows}
    assert len(rows) == len(combinations) == 3 * len(all_reduce_plans(2))
    for row in (*rows, *found["gloo"]):
        assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert row["bus_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])  # 2·(2-1)/2 = 1
    assert all(row["predicted"] > 0 and row["gloo_over_this"] > 0 for row in rows)
