"""Replicas that are killed at chosen moments: the others go on, and the result is that of a run without losses."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from minilib.mechanisms.basics.child import child_environment
from minilib.model.decoder import Decoder
from minilib.operations.elastic import Replicas, ReplicaTrainer
from minilib.ranks.launch import RankFailed, RanksTimedOut
from tests.operations.checkpoint.runs import MIXTURE
from tests.operations.elastic.replica_runs import (
    GATE,
    ReplicaFault,
    committed_windows,
    small_replica,
    trains_as_replica,
)
from tests.operations.elastic.runs import CONFIG, HELD_OUT, ROW, STEPS, check_each_window_once, small_trainer

MOMENTS = ("quorum", "transfer", "compute", "forward", "backward", "message", "vote", "commit")
PATIENCE = 120.0  # as good as none: a busy machine is no fault
SILENCE = 60.0


@pytest.fixture(scope="module")
def alone():
    trainer = small_trainer()
    trainer.run()
    return trainer


def check_like(trainer, replicas: Replicas, values: dict, folder: Path) -> None:
    """All replicas at the end are bit by bit equal, and equal to a run without losses up to rounding."""
    first = next(iter(values.values()))
    for value in values.values():
        assert value["step"] == STEPS and value["losses"] == first["losses"]
        torch.testing.assert_close(value["model"], first["model"], rtol=0, atol=0)
    assert first["losses"] == pytest.approx(trainer.losses, rel=1e-5)
    assert first["grad_norms"] == pytest.approx(trainer.grad_norms[-len(first["grad_norms"]) :], rel=1e-4)
    torch.testing.assert_close(first["model"], dict(trainer.model.state_dict()), rtol=1e-3, atol=1e-4)
    committed = replicas.lighthouse.committed
    assert [each.step for each in committed] == list(range(STEPS))
    check_each_window_once(committed_windows(folder, committed))


def test_three_replicas_train_as_one_process_does(tmp_path, alone):
    with Replicas(trains_as_replica, 3, str(tmp_path), patience=PATIENCE, silence=SILENCE) as replicas:
        values = replicas.values(120)
    assert sorted(values) == [0, 1, 2] and not replicas.failures
    check_like(alone, replicas, values, tmp_path)
    assert {each.replicas for each in replicas.lighthouse.committed} == {(0, 1, 2)}
    assert {each.quorum for each in replicas.lighthouse.committed} == {1}, "one communicator for the whole run"
    assert replicas.lighthouse.voided == [] and replicas.lighthouse.tally.transfers == []
    # A join each; each step ready, quorum, vote, commit; in the end a leave each, and whoever is late asks once more.
    assert 3 + STEPS * 12 + 3 <= replicas.lighthouse.tally.messages <= 3 + STEPS * 12 + 3 + 4


def started(folder: Path, faults: tuple[ReplicaFault, ...], silence: float = SILENCE) -> Replicas:
    return Replicas(trains_as_replica, 3, str(folder), faults, silence=silence, patience=PATIENCE)


def come_back(replicas: Replicas, *which: int, folder: Path) -> None:
    """Once all steps before the gate are committed, wait until these are ready, and let the members go on."""
    replicas.wait_for(GATE, 120)
    for each in which:
        replicas.start(each)
    open_gate(replicas, *which, folder=folder)


def open_gate(replicas: Replicas, *which: int, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not replicas.lighthouse.ready >= set(which):
        assert time.monotonic() < deadline, f"{which} are not ready"
        time.sleep(0.01)
    (folder / "gate").touch()


@pytest.mark.parametrize("moment, victim", zip(MOMENTS, itertools.cycle([0, 1]), strict=False))
def test_one_is_killed_and_brought_back(tmp_path, alone, moment, victim):
    step = random.Random(f"{moment} {victim}").randint(2, 4)
    with started(tmp_path, (ReplicaFault(victim, step, moment, moment == "message"),)) as replicas:
        survivors = {each: replicas.pid(each) for each in {0, 1, 2} - {victim}}
        come_back(replicas, victim, folder=tmp_path)
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    assert {each: values[each]["pid"] for each in survivors} == survivors, "they kept their processes"
    light = replicas.lighthouse
    assert list(replicas.failures) == [victim] and "SIGKILL" in str(replicas.failures[victim])
    first = step + (moment == "commit")  # what was committed counts, though the process died before it applied it
    without = [each.step for each in light.committed if victim not in each.replicas]
    assert without == list(range(first, GATE))
    repeated = [] if moment in ("quorum", "commit") else [step]
    assert [each.step for each in light.voided] == repeated and len(light.tally.stalled) == len(repeated)
    [transfer] = light.tally.transfers
    assert (transfer.step, transfer.replica) == (GATE, victim)
    assert transfer.bytes == pytest.approx(len(small_replica().packed()) * 3, rel=0.2)  # weights and two moments
    assert len(values[victim]["grad_norms"]) == STEPS - GATE, "it took part from that step on, with a peer's state"


@pytest.mark.parametrize("joiner_dies", [True, False])
@pytest.mark.parametrize("moment, count", [("transfer", 0), ("message", 0), ("message", 2)])
def test_killed_during_the_transfer_of_a_state(tmp_path, alone, joiner_dies, moment, count):
    """The joiner is killed as it receives, or its peer as it sends; the others repeat the step."""
    kill = ReplicaFault(1 if joiner_dies else 0, GATE, moment, count, behind=joiner_dies)
    with started(tmp_path, (ReplicaFault(1, 3, "compute"), kill)) as replicas:
        come_back(replicas, 1, folder=tmp_path)
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    light = replicas.lighthouse
    assert [each.step for each in light.voided] == [3, GATE]
    assert light.committed[GATE].replicas == ((0, 2) if joiner_dies else (1, 2))


def test_members_wait_for_one_that_is_awaited_and_take_in_a_fourth(tmp_path, alone):
    with Replicas(trains_as_replica, 3, str(tmp_path), silence=SILENCE, patience=PATIENCE) as replicas:
        replicas.start(3, awaited=True)
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    assert sorted(values) == [0, 1, 2, 3] and 3 in replicas.lighthouse.committed[-1].replicas


def test_two_of_three_are_killed_and_one_returns(tmp_path, alone):
    with started(tmp_path, (ReplicaFault(0, 3, "message"), ReplicaFault(1, 3, "forward"))) as replicas:
        replicas.wait_for(3, 120)
        replicas.start(1)
        replicas.wait_for(GATE, 120)
        (tmp_path / "gate").touch()
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    assert {each.replicas for each in replicas.lighthouse.committed[3:]} <= {(0, 1, 2), (0, 2), (1, 2)}
    assert replicas.lighthouse.committed[-1].replicas == (1, 2)


def test_one_of_three_alone_says_that_there_is_no_quorum(tmp_path):
    faults = (ReplicaFault(0, 3, "message"), ReplicaFault(1, 3, "message"))
    with Replicas(trains_as_replica, 3, str(tmp_path), faults, silence=SILENCE, patience=3.0) as replicas:
        with pytest.raises(RankFailed):
            replicas.values(120)
        assert "NoQuorum: no step is taken: only [2] of [0, 1, 2] are there" in str(replicas.failures[2])
        assert replicas.lighthouse.committed[-1].step == 2
        with pytest.raises(RankFailed):
            replicas.wait_for(STEPS, 120)


@pytest.mark.parametrize("moment", ["quorum", "vote", "commit"])
def test_one_that_sleeps_is_dropped_and_refused_when_it_wakes_up(tmp_path, alone, moment):
    fault = ReplicaFault(2, 3, moment, how=signal.SIGSTOP)
    with started(tmp_path, (fault,), silence=3.0) as replicas:
        replicas.wait_for(GATE, 120)
        asleep = replicas.pid(2)
        assert psutil.Process(asleep).status() == psutil.STATUS_STOPPED
        os.kill(asleep, signal.SIGCONT)
        open_gate(replicas, 2, folder=tmp_path)
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    light = replicas.lighthouse
    assert values[2]["pid"] == asleep and not replicas.failures, "it got a peer's state, and goes on"
    assert [each.step for each in light.committed if 2 not in each.replicas] == list(range(3 + (moment == "commit"), 6))
    assert light.refused == (moment == "vote"), "its vote belonged to a quorum that was over"
    assert [(each.step, each.replica) for each in light.tally.transfers] == [(GATE, 2)]
    if moment == "vote":
        assert [each.why for each in light.voided] == ["replica 2 was not heard of for 3 s"]


def test_one_that_sleeps_to_the_end_is_not_waited_for(tmp_path):
    (tmp_path / "gate").touch()
    with started(tmp_path, (ReplicaFault(2, 3, "compute", how=signal.SIGSTOP),), silence=3.0) as replicas:
        values, asleep = replicas.values(120), replicas.pid(2)
    assert sorted(values) == [0, 1] and not psutil.pid_exists(asleep)


def test_one_that_is_replaced_while_it_sleeps_is_turned_away(tmp_path, alone):
    with started(tmp_path, (ReplicaFault(2, 3, "compute", how=signal.SIGSTOP),)) as replicas:
        replicas.wait_for(3, 120)
        asleep = replicas.pid(2)
        while psutil.Process(asleep).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        replicas.start(2)
        replicas.wait_for(GATE, 120)
        os.kill(asleep, signal.SIGCONT)
        (tmp_path / "gate").touch()
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    assert "CoordinatorLost" in str(replicas.failures[2]) and values[2]["pid"] != asleep


def test_a_replica_that_raises_is_lost_and_its_error_kept(tmp_path, alone):
    (tmp_path / "gate").touch()
    with started(tmp_path, (ReplicaFault(0, 4, "forward", how=0),)) as replicas:
        values = replicas.values(120)
    check_like(alone, replicas, values, tmp_path)
    assert sorted(values) == [1, 2] and "ValueError: a bad batch in step 4" in str(replicas.failures[0])


def test_all_of_them_raise(tmp_path):
    def fails(replica):
        raise TypeError(f"replica {replica.number} does not work")

    with Replicas(fails, 3, patience=PATIENCE) as replicas, pytest.raises(RankFailed, match="does not work"):
        replicas.values(120)


COORDINATOR = """
import sys, time
from minilib.operations.elastic import Replicas
from tests.operations.elastic.replica_runs import ReplicaFault, trains_as_replica
with Replicas(trains_as_replica, 3, sys.argv[1], (ReplicaFault(9, 9, ""),)) as replicas:
    replicas.wait_for(6, 120)
    print(*(replicas.pid(n) for n in range(3)), replicas.lighthouse.path.parent, flush=True)
    time.sleep(120)
"""


def test_replicas_end_by_themselves_when_the_coordinator_is_killed(tmp_path):
    command = [sys.executable, "-c", COORDINATOR, str(tmp_path)]
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as coordinator:
        *pids, folder = coordinator.stdout.readline().split()
        assert all(psutil.pid_exists(int(pid)) for pid in pids)
        coordinator.kill()
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(int(pid)) for pid in pids) or Path(folder).exists():
        assert time.monotonic() < deadline, "a replica outlives the coordinator, or its folder does"
        time.sleep(0.05)


def test_the_user_ends_everything(tmp_path):
    with started(tmp_path, (ReplicaFault(9, 9, ""),)) as replicas:
        replicas.wait_for(GATE, 120)
        pids, folder = [replicas.pid(n) for n in range(3)], replicas.lighthouse.path.parent
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            replicas.values(120)
    assert not any(map(psutil.pid_exists, pids)) and not folder.exists()


def test_wrong_arguments_are_refused():
    model = Decoder(MIXTURE)
    with pytest.raises(ValueError, match="pass a dense model"):
        ReplicaTrainer(model, ROW, HELD_OUT, CONFIG)
    with pytest.raises(ValueError, match="num_replicas is a whole number ≥ 1, got 0"):
        Replicas(trains_as_replica, 0)
    with pytest.raises(ValueError, match="silence is a finite number > 0, got 0"):
        Replicas(trains_as_replica, 1, silence=0)
    with Replicas(time.sleep, 1) as replicas:
        with pytest.raises(ValueError, match=r"replica 5 was never started; started are \[0\]"):
            replicas.kill(5)
        with pytest.raises(RanksTimedOut, match="step 1 was not reached within 0 s"):
            replicas.wait_for(1, 0)
