"""The benchmark of decisions: its jobs run, and how much a decision looks at does not grow with the cluster."""

from tools.bench import placement


def test_decisions_are_measured_and_counted():
    found = placement.placement((20, 200), count=40, seeds=1, jobs=200, mixes=placement.MIXES[-2:])
    assert [(row["gpus"], row["waiting"]) for row in found["decisions"]] == [(160, 0), (160, 50), (1600, 0), (1600, 50)]
    for row in found["decisions"]:
        assert 0 < row["seconds"] <= row["slowest"] and row["quartiles"][0] <= row["quartiles"][1]
        assert row["running"] > 0 and 0 < row["looked_at"] <= row["most_looked_at"]
    for small, large in zip(found["decisions"][:2], found["decisions"][2:], strict=True):
        assert large["looked_at"] <= 2 * small["looked_at"] + 200
    fragmented, compared = found["fragmentation"], found["policies"]
    assert len(fragmented) == 2 * 3 and {row["placing"] for row in fragmented} >= {
        "first fit",
        "best fit",
        "consolidating",
    }
    for row in fragmented:
        largest = row["largest"]
        assert 0 < largest["domain"] <= largest["rack"] <= largest["unit"] <= largest["anywhere"] <= row["free"] + 1e-6
    assert [placement.largest_asked_for(row["cluster"]) for row in fragmented] == ["unit"] * 3 + ["domain"] * 3
    assert len({row["name"] for row in compared}) == len(compared) == 11
    assert all(0 < row["goodput"] <= row["utilisation"] <= 1 for row in compared)
    assert len(list(placement.lines(found))) == 4 + len(fragmented) + len(compared)
