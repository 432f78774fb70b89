import pytest

from minilib.mechanisms.telemetry import Histogram
from minilib.operations.diagnosis.breakdown import WAIT, step_breakdown, step_durations
from minilib.operations.drills.training.traces import unnamed_traces


def test_ranks_of_one_job_take_as_long_and_the_parts_of_a_step_add_up():
    for steps in unnamed_traces().values():
        rows = step_breakdown(steps)
        assert [row.rank for row in rows] == list(range(4))
        for row in rows:
            assert sum(row.parts.values()) == pytest.approx(row.step_ns, rel=0.5) and row.parts[WAIT] >= 0


def test_durations_of_ranks_merge_into_those_of_the_job():
    steps = unnamed_traces()["A"]
    by_rank = step_durations(steps)
    every = [record.wall_ns for records in steps for record in records]
    merged = Histogram.merged(by_rank)
    assert (merged.count, merged.total, merged.maximum) == (len(every), sum(every), max(every))
    assert merged.quantile(0.5) == Histogram.of(every).quantile(0.5)


def test_no_step_has_no_breakdown():
    with pytest.raises(ValueError, match="at least one step"):
        step_breakdown([])
