"""The benchmark of chapter 18, tried out with a state of moments."""

import json

from tools.bench import checkpointing as bench


def test_every_figure_is_there():
    found = bench.checkpointing(40_000, turns=1, steps=2)  # which compares every load with what was saved
    assert json.dumps(found)
    assert [row["way"] for row in found["durable"]] == list(bench.WAYS)
    assert all(row["save"] > 0 and row["load"] > 0 and row["memory"] >= 0 for row in found["durable"])
    assert set(found["stall"]) == {"copy", "this", "dcp.async_save"} and min(found["stall"].values()) > 0
    assert found["beside"]["steps"] >= 2 and found["beside"]["alone"] > 0
    assert len(bench.lines(found)) == len(bench.WAYS) + 2


def test_a_state_has_the_bytes_that_were_asked_for():
    tensors = bench.tensors_of(4 * bench.TENSOR + 12)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * bench.TENSOR + 12
    assert [len(tensor) for tensor in tensors.values()] == [bench.TENSOR, 3]
