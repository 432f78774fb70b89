"""Faults in a real training job of four ranks: the instruments name kind and rank, and are silent if there is none."""

import dataclasses
import random

import pytest

from minilib.operations.diagnosis.heartbeat import Pulse
from minilib.operations.diagnosis.liveness import RankError
from minilib.operations.drills.score import score_drills
from minilib.operations.drills.training import traces
from minilib.operations.drills.training.diagnose import diagnose
from minilib.operations.drills.training.drill import STILL, Evidence, run_drill, stands_still
from minilib.operations.drills.training.fault import KINDS, STEPS, drawn_fault
from minilib.operations.drills.training.runs import DrillRun, drill
from minilib.operations.drills.training.traces import TRACED, record_traces, unnamed_traces


@pytest.mark.parametrize("kind", KINDS)
def test_the_fault_is_named_with_its_rank_and_nothing_else(kind):
    fault = drawn_fault(kind, random.Random(500))
    found = diagnose(run_drill(fault))
    assert [DrillRun(500, fault, found).is_right(finding) for finding in found] == [True], [str(f) for f in found]
    assert found[0].evidence


def test_healthy_runs_have_no_finding():
    runs = [DrillRun(seed, None, diagnose(run_drill(None))) for seed in range(4)]
    score = score_drills(runs)
    assert (score.false_alarms, score.healthy) == (0, 4), [str(f) for run in runs for f in run.findings]


def test_the_evidence_of_a_healthy_run_is_complete_and_does_not_hold_the_fault():
    evidence = run_drill(None)
    assert len(evidence.steps) == STEPS and evidence.errors == evidence.died == []
    assert all(pulse.place == "done" for pulse in evidence.pulses)
    assert {link for link, messages in evidence.links.items() if len(messages) > 50} >= {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert [dump.rank for dump in evidence.dumps] == [0, 1, 2, 3] and all(dump.closed for dump in evidence.dumps)
    assert "fault" not in {field.name for field in dataclasses.fields(Evidence)}


def test_a_job_stands_still_only_if_no_rank_goes_on_for_long():
    def pulses(*stills, step=5, beats=200, place="loss"):
        return [Pulse(9, beats, still, step, place) for still in stills]

    assert stands_still(pulses(STILL, STILL + 5, beats=STILL + 10))
    assert not stands_still(pulses(STILL, 3))
    assert not stands_still([*pulses(STILL), Pulse(0, 0, 0, 0, "start")])  # a rank has not begun
    assert not stands_still(pulses(STILL, beats=STILL + 100))  # 20 beats a step: it may take 400
    assert stands_still(pulses(400, beats=500))
    assert not stands_still(pulses(0, 0, place="done"))


def test_a_lost_rank_explains_what_the_others_report():
    evidence = run_drill(None)
    gone = dataclasses.replace(evidence, died=[2])
    assert [(found.kind, found.rank) for found in diagnose(gone)] == [("lost_heartbeat", 2)]


def test_an_error_that_nothing_explains_is_told_and_one_that_something_explains_is_not():
    healthy, error = run_drill(None), RankError(3, 2, "RuntimeError", "a bug", "")
    assert [str(f) for f in diagnose(dataclasses.replace(healthy, errors=[error]))] == [
        "error, rank 3: RuntimeError in step 2: a bug"
    ]
    gone = dataclasses.replace(healthy, errors=[error], died=[1])
    assert [(found.kind, found.rank) for found in diagnose(gone)] == [("lost_heartbeat", 1)]


def test_drill_runs_the_faults_of_its_seeds():
    asked = []
    runs = drill(range(22), lambda fault: asked.append(fault) or [])
    assert [run.fault for run in runs] == asked and sum(fault is None for fault in asked) == 10
    assert score_drills(runs).recall == 0


def test_each_stored_trace_shows_another_of_six_faults():
    found = {letter: diagnose(as_evidence(steps)) for letter, steps in unnamed_traces().items()}
    assert list(found) == list("ABCDEF") and sorted(f.kind for [f] in found.values()) == sorted(TRACED)


def as_evidence(steps):
    return Evidence(steps, [], [], [], [], {}, [])


def test_traces_are_made_anew_and_do_not_name_their_fault(tmp_path, monkeypatch):
    healthy = run_drill(None)
    monkeypatch.setattr(traces, "run_drill", lambda fault: healthy)
    kinds = record_traces(3, tmp_path / "traces")
    assert sorted(kinds) == sorted(TRACED) and kinds != list(TRACED)
    assert unnamed_traces(tmp_path / "traces") == dict.fromkeys("ABCDEF", healthy.steps)
    assert not any(kind.encode() in traces.STORED.read_bytes() for kind in TRACED)
    (tmp_path / "other").write_bytes(traces.gzip.compress(b"nothing\n"))
    with pytest.raises(ValueError, match="a letter and a step record"):
        unnamed_traces(tmp_path / "other")
