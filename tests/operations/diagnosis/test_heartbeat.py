"""Heartbeats of processes that live, hang, are stopped or are killed, as another process reads them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minilib.operations.diagnosis.heartbeat import PLACES, Heartbeat, Pulse, PulseWatch, read_pulse
from minilib.operations.diagnosis.liveness import SILENT, RankError, full_disks, lost_heartbeats

BEATS = """
import sys, time
from pathlib import Path
from minilib.operations.diagnosis.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), period=0.005) as heartbeat:
    heartbeat.tell(3, "forward")
    time.sleep(600)
"""


def until(condition, tries=6000):
    for _ in range(tries):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_rank_says_where_it_is_and_beats_go_on(tmp_path):
    path = tmp_path / "0.beat"
    assert read_pulse(path) == Pulse(0, 0, 0, 0, "start")  # before it begins
    with Heartbeat(path, period=0.001) as heartbeat:
        assert until(lambda: read_pulse(path).still > 5)  # it has no progress
        heartbeat.tell(4, "optimizer")
        pulse = read_pulse(path)
        assert (pulse.pid, pulse.step, pulse.place, pulse.over) == (os.getpid(), 4, "optimizer", False)
        assert until(lambda: read_pulse(path).still > 2)
        heartbeat.tell(4, "done")
        assert read_pulse(path).over
    last = read_pulse(path)
    assert last.beats > 7 and read_pulse(path) == last  # the file stays as it is


def test_a_place_that_is_none_is_refused(tmp_path):
    with Heartbeat(tmp_path / "0.beat") as heartbeat, pytest.raises(ValueError, match="start, data.*elsewhere"):
        heartbeat.tell(0, "elsewhere")
    assert PLACES[0] == "start"


def test_a_file_that_is_being_made_reads_as_not_begun(tmp_path):
    (tmp_path / "0.beat").write_bytes(b"\1" * 7)
    assert read_pulse(tmp_path / "0.beat").pid == 0


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_falls_silent(tmp_path, end):
    paths = [tmp_path / f"{rank}.beat" for rank in range(3)]
    processes = [subprocess.Popen([sys.executable, "-c", BEATS, path]) for path in paths]
    try:
        watch = PulseWatch(paths)

        def looked():
            watch.look()
            return True

        assert until(lambda: looked() and all(pulse.still > 5 for pulse in watch.pulses))
        assert max(watch.silent) < SILENT
        processes[1].send_signal(end)
        assert until(lambda: looked() and watch.silent[1] >= SILENT)
        assert max(watch.silent[0], watch.silent[2]) < SILENT
        [found] = lost_heartbeats(watch.pulses, watch.silent)
        assert (found.kind, found.rank) == ("lost_heartbeat", 1) and "in step 3" in found.evidence
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_ranks_that_have_ended_or_are_known_to_be_dead():
    done, alive = Pulse(1, 9, 0, 14, "done"), Pulse(2, 9, 0, 14, "loss")
    assert lost_heartbeats([done, alive], [500, 0]) == []
    [found] = lost_heartbeats([done, alive], [0, 0], died=[1])
    assert (found.kind, found.rank) == ("lost_heartbeat", 1)


def test_of_all_ranks_that_fail_to_save_the_one_whose_disk_is_full_is_named():
    errors = [RankError(rank, 10, "SaveFailed", "rank 2 met …", "ENOSPC" * (rank == 2)) for rank in range(4)]
    [found] = full_disks(errors)
    assert (found.kind, found.rank) == ("full_disk", 2)
    assert full_disks([RankError(0, 10, "SaveFailed", "", "EIO")]) == full_disks([]) == []
