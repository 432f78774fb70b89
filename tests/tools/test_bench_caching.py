"""The bench of chapter 11: every figure is there, and counts are those of the closed forms."""

from minilib.numbers.machine import Machine
from tools.bench import caching


def test_every_figure_is_there():
    machine = Machine.load("intel-xeon-2-cores")
    small = caching.SMALL.__class__(**{**caching.SMALL.__dict__, "hidden_size": 64, "intermediate_size": 64,
                                        "vocab_size": 256, "num_layers": 1})  # fmt: skip
    found = caching.caching(machine, rows=(1, 4), new=(3,), budget=0.01, config=small)
    assert [row["rows"] for row in found["decode"]] == [row["rows"] for row in found["prompt"]] == [1, 4]
    assert found["parameters"] == small.num_parameters
    assert found["predicted_ridge"] == 2 * machine.ridge("fp32")
    (run,) = found["generation"]
    assert (run["computed_without"], run["computed_with"]) == (32 + 33 + 34, 34)
    decode = found["decode"]
    assert found["decode_ridge"] == decode[0]["seconds"] / (decode[1]["seconds"] / 4)
