"""The bench of batches and policies: every figure is there, and is a ratio of what was measured."""

import statistics

from minilib.mechanisms.scheduling import POLICIES
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from tools.bench.batching import batching


def test_every_figure_is_there():
    small = ModelConfig(97, 32, 48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, max_position=1024)
    found = batching(Decoder(small).eval(), turns=1, requests=18)
    static, chunks = found["static"], found["chunks"]
    assert static["ratios"] == [static["continuous"][0] / static["static"][0]]
    assert static["continuous_over_static"] == statistics.median(static["ratios"]) > 0
    (whole, chunked) = (chunks["budgets"][budget] for budget in ("2048", "128"))
    assert chunks["itl_p99_over_whole"] == chunked["itl_p99"][0] / whole["itl_p99"][0] > 0
    assert chunks["rate_over_whole"] == chunked["rate"][0] / whole["rate"][0] > 0
    assert found["policies"].keys() == POLICIES.keys() and found["policies"]["fcfs"] == 1
