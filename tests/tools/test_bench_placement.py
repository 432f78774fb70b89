"""The benchmark of decisions: its jobs run, and how much a decision looks at does not grow with the cluster."""

from tools.bench import placement


def test_decisions_are_measured_and_counted():
    found = placement.placement((20, 200), count=40)
    assert [(row["gpus"], row["waiting"]) for row in found["decisions"]] == [(160, 0), (160, 50), (1600, 0), (1600, 50)]
    for row in found["decisions"]:
        assert 0 < row["seconds"] <= row["slowest"] and row["quartiles"][0] <= row["quartiles"][1]
        assert row["running"] > 0 and 0 < row["looked_at"] <= row["most_looked_at"]
    for small, large in zip(found["decisions"][:2], found["decisions"][2:], strict=True):
        assert large["looked_at"] <= 2 * small["looked_at"] + 200
    assert len(list(placement.lines(found))) == 4
