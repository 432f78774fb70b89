"""Logs in the Standard Workload Format: what is read, what is skipped, and every way to be wrong."""

import importlib.metadata

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.simulation.simulator import simulate_cluster
from minilib.operations.placement.simulation.swf import InvalidLog, OutOfOrder, WrongFields, parse_swf, read_swf

LOG = """; Version: 2.2
; MaxProcs: 16
;
 1  0 -1  100  8 -1 -1  8  120 -1 1  3 1 -1 1 -1 -1 -1
; a comment in between: no header
 2  5 -1   60 16 -1 -1 16   -1 -1 1  4 1 -1 1 -1 -1 -1
 3  5 -1   -1 -1 -1 -1  4   60 -1 5  4 1 -1 1 -1 -1 -1
 4  9 -1  0.5 -1 -1 -1  4   60 -1 1 -1 1 -1 1 -1 -1 -1
"""
GOOD = "1 0 -1 100 8 -1 -1 8 120 -1 1 3 1 -1 1 -1 -1 -1"


def test_a_log_is_read_and_runs(tmp_path):
    (tmp_path / "log.swf").write_text(LOG)
    log = read_swf(tmp_path / "log.swf")
    assert log.header == {"Version": "2.2", "MaxProcs": "16"} and log.skipped == 1
    rows = [(j.job.name, j.job.gpus, j.job.tenant, j.arrival, j.seconds, j.job.seconds) for j in log.jobs]
    assert rows == [("1", 8, "user3", 0, 100, 120), ("2", 16, "user4", 5, 60, 60), ("4", 4, "", 9, 0.5, 60)]
    run = simulate_cluster(log.jobs, GangScheduler(GpuCluster.regular(1, 2, 8)))
    run.check_invariants()
    assert [record.ended for record in run.jobs] == [100, 160, 9.5]


def test_processors_that_make_a_gpu():
    assert [each.job.gpus for each in parse_swf(LOG.splitlines(), 6).jobs] == [2, 3, 1]
    with pytest.raises(ValueError, match="processors_per_gpu"):
        parse_swf([], 0)


def test_nothing_and_comments_alone():
    assert parse_swf([]).jobs == [] and parse_swf(["", "; Note: none"]).header == {"Note": "none"}


@pytest.mark.parametrize(
    "line, error, says",
    [
        ("1 2 3", WrongFields, "line 2: 3 fields"),
        (GOOD.replace(" 100 ", " soon "), WrongFields, "run time is a number, got 'soon'"),
        (GOOD.replace(" 100 ", " -7 "), InvalidLog, "run time is a finite number"),
        (GOOD.replace(" 100 ", " nan "), WrongFields, "run time"),
        (GOOD.replace(" 100 ", " 1e999 "), InvalidLog, "run time"),
        (GOOD.replace("1 0 ", "1 -1 ", 1), InvalidLog, "submit time"),
        (GOOD, OutOfOrder, "job 1 comes twice"),
        (GOOD.replace("1 0 ", "2 0 ", 1), OutOfOrder, "after 4: sort"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(line, error, says):
    first = GOOD.replace("1 0 ", "1 4 ", 1)
    with pytest.raises(error, match=says) as caught:
        parse_swf([first, line])
    assert "line 2" in str(caught.value) and isinstance(caught.value, InvalidLog)


def test_lines_in_any_order():
    later = GOOD.replace("1 0 ", "2 9 ", 1)
    with pytest.raises(OutOfOrder, match="any_order"):
        parse_swf([later, GOOD])
    assert [each.job.name for each in parse_swf([later, GOOD], any_order=True).jobs] == ["1", "2"]


def test_a_log_that_somebody_else_wrote():
    """Batsim's, as evalys 4.0.7 ships it beside its tests: 800 jobs, not sorted, and none of them waited."""
    try:
        files = importlib.metadata.files("evalys")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("evalys==4.0.7, which ships a log, is not installed here")
    (path,) = (file.locate() for file in files if file.name == "easy_mediumWL_smallPF.swf")
    with pytest.raises(OutOfOrder, match="line 5"):
        read_swf(path)
    log = read_swf(path, any_order=True)
    assert len(log.jobs) == 800 and log.skipped == 0 and log.header == {}
    run = simulate_cluster(log.jobs, GangScheduler(GpuCluster.regular(1, 54, 1)), instants=False)
    run.check_invariants()
    assert run.first_waits() == [0.0] * 800, "54 processors ran at once at most"
