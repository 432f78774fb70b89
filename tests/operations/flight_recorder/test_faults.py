"""Real faults on real ranks: each verdict names kind and rank, and healthy jobs are healthy."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from minilib.operations.flight_recorder import NotARecording, analyse, read_dumps
from tests.operations.flight_recorder import faults

KINDS = {
    "not_entered": "not_entered",
    "stopped": "not_entered",
    "killed": "dead",
    "slow": "slow",
    "order": "deadlock",
    "shape": "mismatch",
    "dtype": "mismatch",
    "op": "mismatch",
    "reduce_op": "mismatch",
    "root": "mismatch",
}
PLACES = {"order": [("dp", 6), ("ep", 4)]}
HEALTHY_RUNS = 50


@pytest.mark.parametrize("fault", KINDS)
def test_kind_and_rank_of_a_fault_are_named_when_the_job_is_over(fault, folder):
    for culprit in (0, 2):
        dumps, dead = faults.recorded(folder / str(culprit), fault, culprit)
        verdict = analyse(dumps, dead, patience=0.35)
        assert verdict.kind == KINDS[fault], str(verdict)
        named = verdict.ranks[:1] if fault != "order" else set(verdict.ranks) & {culprit}
        assert list(named) == [culprit] and len(verdict.ranks) == 1 + (fault == "order"), str(verdict)
        assert "flight_recorder/faults.py:" in verdict.evidence
        assert fault == "killed" or (verdict.group.name, verdict.sequence) in PLACES.get(fault, [("dp", 7)])


def test_two_ranks_that_disagree_are_both_named(folder):
    dumps, _ = faults.recorded(folder / "job", "shape", culprit=1, world_size=2)
    verdict = analyse(dumps)
    assert (verdict.kind, verdict.ranks) == ("mismatch", (0, 1))
    assert "(8,)" in verdict.evidence and "(2, 4)" in verdict.evidence


@pytest.mark.parametrize(("fault", "letter"), [("not_entered", "RSD"), ("stopped", "T")])
def test_a_job_is_read_while_it_hangs_and_goes_on_after_that(fault, letter, folder, monkeypatch):
    monkeypatch.setattr(faults, "TIMEOUT", 30.0)
    thread = threading.Thread(target=faults.recorded, args=(folder / "job", fault, 1))
    thread.start()
    verdict = hung(folder / "job")
    assert (verdict.kind, verdict.ranks) == ("not_entered", (1,)), str(verdict)
    state = read_dumps(folder / "job", "rank*")[1].process
    assert state in letter and ("is stopped" in verdict.evidence) == (fault == "stopped")
    (folder / "job" / "go").touch()
    os.kill(int((folder / "job" / "pid1").read_text()), signal.SIGCONT)
    thread.join()
    after = analyse(read_dumps(folder / "job", "rank*"), patience=0.2)
    assert (after.kind, after.ranks) == ("slow", (1,)), str(after)


def hung(folder: Path):
    """The first verdict that is not "healthy"."""
    deadline = time.monotonic() + 25
    while time.monotonic() < deadline:
        time.sleep(0.05)
        try:
            dumps = read_dumps(folder, "rank*")
        except NotARecording:  # not ready yet
            continue
        if len(dumps) == 3 and (verdict := analyse(dumps, patience=0.3)).kind != "healthy":
            return verdict
    raise AssertionError("the job did not hang")


def test_healthy_jobs_are_healthy(folder):
    verdicts = []
    for seed in range(HEALTHY_RUNS):
        dumps, dead = faults.recorded(folder / str(seed), world_size=2 + seed % 3, steps=3, seed=seed)
        assert not dead and all(dump.entered and dump.closed for dump in dumps)
        verdicts.append(analyse(dumps))
    assert [verdict.kind for verdict in verdicts] == ["healthy"] * HEALTHY_RUNS, [str(v) for v in verdicts if v.ranks]
