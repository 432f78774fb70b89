"""The benchmark of the drills at its smallest: what it records, and what it says of that."""

import json
import math

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.drills.training.fault import KINDS, fault_of_seed
from minilib.operations.drills.training.runs import DrillRun
from tools.bench import drills as bench

COST = {"wall": {"off": 0.02, "on": 0.0202, "ratio": 1.01}, "cpu": {"off": 0.01, "on": 0.0101, "ratio": 1.01},
        "records_per_step": {"phases": 6}}  # fmt: skip


def test_all_runs_are_scored_and_the_record_says_so(monkeypatch):
    asked = []

    def named(fault):
        asked.append(fault)
        peer = fault.link[1] if fault and fault.kind == "slow_link" else None
        return [Finding(fault.kind, fault.rank, "", peer)] if fault else []

    monkeypatch.setattr(bench, "run_drill", lambda fault: fault)
    monkeypatch.setattr(bench, "diagnose", named)
    monkeypatch.setattr(bench, "instruments", lambda turns, steps: COST)
    found = bench.drills()
    assert asked == [fault_of_seed(seed) for seed in range(bench.SCORED, bench.SCORED + bench.RUNS)]
    score = found["score"]
    assert (score["faulty"], score["healthy"], score["recall"], score["false_alarms"]) == (120, 100, 1.0, 0)
    assert score["confusion"] == {kind: {kind: 10} for kind in KINDS} | {"healthy": {"healthy": 100}}
    assert json.loads(json.dumps(found)) == found
    said = list(bench.lines(found))
    assert said[0].startswith("120 faults: recall 100.0%, precision 100.0%; 0 false alarms in 100 healthy runs")
    assert len(said) == 1 + 13 + 2 + 1


def test_a_miss_and_a_false_alarm_stand_in_the_table():
    fault = fault_of_seed(0)
    runs = [DrillRun(0, fault, []), DrillRun(1, None, [Finding("hung_rank", 0, "")])]
    table = bench._plain(bench.score_drills(runs))["confusion"]
    assert table == {fault.kind: {"healthy": 1}, "healthy": {"hung_rank": 1}}


def test_instruments_are_priced_and_their_records_counted():
    found = bench.instruments(turns=2, steps=2)
    for clock in ("wall", "cpu"):
        assert all(math.isfinite(found[clock][side]) and found[clock][side] > 0 for side in ("off", "on", "ratio"))
    # An all-reduce of the gradients, a ring with a message in and one out in both of its rounds; and one of the loss,
    # by a tree, whose root receives and sends.
    assert found["records_per_step"] == {"phases": 6, "steps": 1, "collectives": 2, "message ends": 6}
