"""The benchmark of chapter 07, tried out with a model of moments."""

import json
from dataclasses import replace

from tools.bench import tensor_parallel as bench


def test_every_figure_is_there():
    small = replace(bench.MODEL, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, head_dim=8)
    found = bench.tensor_parallel(1, small)  # which holds every loss against torch's
    assert json.dumps(found)
    assert [group["transport"] for group in found["over_peer"]] == list(bench.COMMUNICATORS)
    for group in found["over_peer"]:
        for part in ("forward", "step"):
            assert [row["method"] for row in group[part]] == [*bench.OURS, bench.PEER]
            assert all(row["seconds"] > 0 and row["over_peer"] > 0 for row in group[part])
            assert group[part][-1]["over_peer"] == 1
