"""The benchmark of chapter 08, tried out on two ranks."""

import json

from tools.bench import pipeline as bench


def test_every_figure_is_there(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SHAPED", bench.StageTimes(0.001, 0.001, 0.001))
    monkeypatch.setattr(bench, "SCHEDULES", {name: bench.SCHEDULES[name] for name in ("1f1b", "zbv")})
    monkeypatch.setattr(bench, "WORLD_SIZES", (2,))
    found = bench.pipeline()
    assert json.loads(json.dumps(found))["steps"] == [json.loads(json.dumps(row)) for row in found["steps"]]
    [row] = found["steps"]
    assert [method["method"] for method in row["methods"]] == ["1f1b", "torch.distributed.pipelining"]
    assert [row["schedule"] for row in found["bubbles"]] == ["1f1b", "zbv"]
    for row in found["bubbles"]:
        assert row["seconds"] >= row["predicted_seconds"] > 0 and 0 < row["bubble"] < 1 > row["predicted_bubble"] > 0
    assert len(list(bench.lines(found))) == 3


def test_both_compute_the_same_gradients():
    """On ranks, the step that is timed: ours, and torch's own of the same stages."""
    same = bench.launch.run(bench.largest_difference, 2, timeout=200)
    assert max(same) < 1e-6
