"""Real processes and real pipes against the timeline of a flow: in ticks, item by item, however busy the machine is."""

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from minilib.classic import pipe_processes
from minilib.classic.counted_work import ROUNDS
from minilib.classic.pipe_processes import PipeSizeUnsupported, StageFailed
from minilib.classic.pipe_stage import MOVE, RUN
from minilib.classic.unix_pipes import run_freely, run_in_ticks
from minilib.mechanisms.basics.child import child_environment
from minilib.mechanisms.pipelining import flow, flow_seconds, most_in_flight, timeline_of, waiting


@pytest.fixture(autouse=True)
def nobody_and_nothing_is_left_behind():
    me = psutil.Process()
    before, files = {child.pid for child in me.children(recursive=True)}, me.num_fds()
    yield
    assert not {child.pid for child in me.children(recursive=True)} - before
    assert me.num_fds() == files


def expected_results(units, num_items):
    """Of every item after all units of all stages."""
    found = []
    for item in range(num_items):
        result = hashlib.sha256(str(item).encode()).digest()
        for _ in range(ROUNDS * sum(row[item] for row in units)):
            result = hashlib.sha256(result).digest()
        found.append(result)
    return tuple(found)


def check(units, num_items, capacity):
    """A run in ticks is the predicted one, operation by operation."""
    run = run_in_ticks(units, num_items, capacity)
    rows = [[each] * num_items if isinstance(each, int) else each for each in units]
    predicted = timeline_of(flow(num_items, len(rows), capacity), lambda key: rows[key[0]][key[1]])
    assert run.timeline == predicted
    assert list(zip(run.starved, run.blocked, strict=True)) == waiting(predicted, capacity)
    assert run.results == expected_results(rows, num_items)
    return run


@pytest.mark.parametrize(
    ("units", "num_items"), [((5,), 3), ((1, 2, 1), 6), ((2, 1), 1), ((1, 1, 1, 1), 4), ((0, 2, 0), 4), ((3, 1), 5)]
)
def test_fill_drain_and_the_slowest_stage(units, num_items):
    run = check(units, num_items, 2)
    assert run.timeline.makespan == flow_seconds(units, num_items)
    assert run.timeline.workers[-1][0].start == sum(units[:-1])


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_back_pressure_of_a_bounded_pipe(capacity):
    """The slowest stage is the last: each hand and each pipe is full, and those before it wait to write."""
    run = check((1, 1, 4), 16, capacity)
    assert most_in_flight(run.timeline) == 3 + 2 * capacity
    assert run.blocked[0] > 0 and run.blocked[1] > 0 and run.blocked[2] == 0
    assert run.starved == (0, 1, 2), "nobody waits to read, once the pipe is filled"


def test_behind_the_slowest_stage_all_wait_to_read():
    run = check((4, 1, 1), 8, 1)
    assert run.blocked == (0, 0, 0) and most_in_flight(run.timeline) == 2
    assert run.starved == (0, 4 + 7 * 3, 5 + 7 * 3)


@pytest.mark.parametrize("seed", range(3))
def test_items_of_different_work(seed):
    draw = random.Random(seed)
    units = [[draw.randint(0, 4) for _ in range(7)] for _ in range(3)]
    check(units, 7, draw.choice((1, 2)))


def test_processes_that_run_freely_keep_the_order_and_the_bounds_of_the_plan():
    """What must hold at any speed; how long it takes is the reader's."""
    units, num_items, capacity = (1, 3, 2), 9, 2
    run = run_freely(units, num_items, capacity, unit_seconds=0.002)
    assert run.results == expected_results([[each] * num_items for each in units], num_items)
    spans = {span.key: span for span in run.timeline}
    for operations in flow(num_items, len(units), capacity):
        for operation in operations:
            assert all(spans[key].end <= spans[operation.key].start for key in operation.after)
    for span in run.timeline:
        assert span.end - span.start >= 0.002 * units[span.key[0]]
    assert most_in_flight(run.timeline) <= len(units) + capacity * (len(units) - 1)
    assert min(*run.starved, *run.blocked) >= 0 and run.timeline.workers[0][0].start == 0


@pytest.mark.parametrize("run", [run_in_ticks, run_freely])
def test_a_stage_that_dies_is_named(run, monkeypatch):
    def killing(processes, stage, command, tell=pipe_processes.StageProcesses.tell):
        if command in (MOVE, RUN):
            os.kill(processes._processes[1].pid, signal.SIGKILL)
        tell(processes, stage, command)

    monkeypatch.setattr(pipe_processes.StageProcesses, "tell", killing)
    with pytest.raises(StageFailed, match="stage 1, process [0-9]+, was killed by SIGKILL"):
        run((1, 1, 1), 500, 1)


@pytest.mark.parametrize("run", [run_in_ticks, run_freely])
def test_a_stage_that_hangs_is_named(run, monkeypatch):
    def stopping(processes, stage, command, tell=pipe_processes.StageProcesses.tell):
        if command in (MOVE, RUN):
            os.kill(processes._processes[0].pid, signal.SIGSTOP)
        tell(processes, stage, command)

    monkeypatch.setattr(pipe_processes.StageProcesses, "tell", stopping)
    with pytest.raises(StageFailed, match="stage 0 did not answer within 0.5 s"):
        run((1, 1), 50, 1, timeout=0.5)


def test_stages_end_when_whoever_started_them_is_killed():
    code = "from minilib.classic.unix_pipes import run_freely; run_freely((1, 1), 10**4, 1, unit_seconds=0.01)"
    with subprocess.Popen([sys.executable, "-c", code], env=child_environment()) as starter:
        me = psutil.Process(starter.pid)
        wait_for(lambda: len(me.children()) == 2 and all("pipe_stage" in str(c.cmdline()) for c in me.children()))
        time.sleep(0.1)  # until they run
        stages = me.children()
        starter.kill()
    wait_for(lambda: not any(stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE for stage in stages))


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.mark.parametrize("capacity", [0, -1, 3, 1.0, True, 2**20, 2**40, 2**70])
def test_pipes_that_there_are_not(capacity):
    with pytest.raises(PipeSizeUnsupported, match=f"power of two of pages, at least 1; got {capacity}|system refuses"):
        run_in_ticks((1, 1), 2, capacity)


@pytest.mark.parametrize(("units", "num_items"), [((), 1), ((1,), 0), ((1, -1), 2), (([1, 2, 3], 1), 2),
                                                   ((1.5, 1), 2), (([1, 0.5], 1), 2), ((True, 1), 2), ("12", 2),
                                                   ((1, None), 2), ((1,), 1.0), ((1,), True)])  # fmt: skip
def test_work_that_is_none(units, num_items):
    with pytest.raises(ValueError, match="needs 1 stage or more, 1 item or more"):
        run_in_ticks(units, num_items, 1)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_times_that_are_none(seconds, monkeypatch):
    monkeypatch.setattr(pipe_processes.subprocess, "Popen", None)  # nothing may start
    for run in (run_in_ticks, run_freely):
        for timeout in (seconds, 0, 1e7):
            with pytest.raises(ValueError, match="timeout is more than 0 and at most 1e"):
                run((1, 1), 2, 1, timeout=timeout)
    with pytest.raises(ValueError, match="a unit of work takes a time of 0 or more, got"):
        run_freely((1, 1), 2, 1, unit_seconds=seconds)


@pytest.mark.parametrize("num_items", [1000, 70_000])
def test_as_many_items_as_one_likes(num_items):
    """More reports than a socket holds, and more numbers than a program takes as one argument."""
    run = run_freely((0, 0), num_items, 16)
    assert len(run.results) == num_items
    assert run.results[-1] == hashlib.sha256(str(num_items - 1).encode()).digest()


def test_ticks_of_as_many_items():
    run = run_in_ticks((0,), 70_000, 1)
    assert len(run.results) == 70_000 and run.timeline.makespan == 0


@pytest.mark.parametrize("place", ["subprocess.Popen", "socket.socketpair", "os.pipe"])
def test_stages_that_cannot_be_started(place, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    module, name = place.split(".")
    monkeypatch.setattr(getattr(pipe_processes, module), name, refuse)
    with pytest.raises(StageFailed, match="cannot be started: .*Resource temporarily unavailable"):
        run_in_ticks((1, 1), 2, 1)
