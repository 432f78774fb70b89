"""The benchmark of chapter 18, tried out with a state of moments."""

import json

import torch

from minilib.model.config import ModelConfig
from tools.bench import checkpointing as bench

TINY = ModelConfig(61, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64,
                   tie_embeddings=False)  # fmt: skip


def test_every_figure_is_there():
    found = bench.checkpointing(TINY, turns=1, steps=2)  # which compares every load with what was saved
    assert json.dumps(found)
    assert [row["way"] for row in found["durable"]] == list(bench.WAYS)
    for row in found["durable"]:
        assert min(row[what] for what in ("save", "load", "load_from_disk")) > 0
    assert found["memory"].keys() == set(bench.WAYS) and min(found["memory"].values()) >= 0
    assert set(found["stall"]) == set(bench.STALLS) and min(found["stall"].values()) > 0
    assert found["beside"]["steps"] >= 2 and found["beside"]["alone"] > 0
    assert len(bench.lines(found)) == len(bench.WAYS) + 2


def test_the_state_is_that_of_adamw_in_float32_and_no_two_tensors_are_equal():
    tensors = bench.state_of(TINY)
    model = [x for name, x in tensors.items() if name.startswith("model.")]
    assert sum(x.nbytes for x in tensors.values()) == 12 * sum(x.numel() for x in model) + 4 * len(model)
    assert all(x.dtype == torch.float32 for x in tensors.values())
    assert len({(x.shape, x.flatten()[0].item()) for x in tensors.values()}) == len(tensors) == 4 * len(model)
