"""Real processes in the order of a policy: what the kernel says of them, what they compute, and what is left behind."""

import hashlib
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from minilib.classic.counted_work import ROUNDS
from minilib.classic.process_queue import run_processes
from minilib.classic.worker_process import WorkerFailed, WorkerProcess
from minilib.mechanisms.scheduling import (
    POLICIES,
    FairShare,
    FirstComeFirstServed,
    MultiLevelFeedback,
    ShortestRemaining,
    Task,
    TimeSlicing,
    UnknownPolicy,
    UnknownTenant,
)
from tests.mechanisms.scheduling.single_server import serve

MAKE = {
    "fcfs": FirstComeFirstServed,
    "round robin": lambda: TimeSlicing(2),
    "feedback": lambda: MultiLevelFeedback((1, 3), boost=9),
    "srpt": lambda: ShortestRemaining(patience=50),
    "fair share": FairShare,
}
GIVEN = [("a", 0, 7, "x"), ("b", 1, 2, "x"), ("c", 2, 4, "y"), ("d", 9, 1, "x"), ("e", 30, 3, "y")]


def tasks():
    """(task, units) of GIVEN; the last arrives when nobody is there any more."""
    return [(Task(key=key, arrival=at, predicted=units, tenant=tenant), units) for key, at, units, tenant in GIVEN]


def expected_result(name, units):
    result = name.encode()
    for _ in range(units * ROUNDS):
        result = hashlib.sha256(result).digest()
    return result


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not left


@pytest.mark.parametrize("preemptive", [True, False])
@pytest.mark.parametrize("name", MAKE)
def test_processes_run_as_one_server_would_serve_them(name, preemptive):
    """The same slices as on a server that only counts; and every process computed what it computes undisturbed."""
    done = run_processes(MAKE[name](), tasks(), preemptive)
    plain = serve(MAKE[name](), [task for task, _ in tasks()], {task.key: units for task, units in tasks()}, preemptive)
    assert [key for key, units in done.slices for _ in range(units)] == [key for key in plain.sequence if key]
    assert done.ended == plain.ended and done.order == plain.order
    assert done.turnaround == {key: plain.ended[key] - at for key, at, _, _ in GIVEN}
    assert done.results == {key: expected_result(key, units) for key, _, units, _ in GIVEN}
    assert not done.failed


def test_switches_turnaround_and_order_of_a_known_trace():
    three = [(Task(key=key), units) for key, units in (("a", 4), ("b", 2), ("c", 1))]
    done = run_processes("fcfs", three)
    assert (done.slices, done.switches) == ([("a", 4), ("b", 2), ("c", 1)], 2)
    three = [(Task(key=key), units) for key, units in (("a", 4), ("b", 2), ("c", 1))]
    done = run_processes(TimeSlicing(1), three)
    assert done.slices == [("a", 1), ("b", 1), ("c", 1), ("a", 1), ("b", 1), ("a", 2)]
    assert (done.switches, done.order, done.turnaround) == (5, ["c", "b", "a"], {"c": 3, "b": 5, "a": 7})
    assert run_processes("fcfs", []).switches == 0


def test_all_but_one_are_stopped_by_the_kernel():
    seen = []

    def watch(processes, current):
        seen.append({key: process.status for key, process in processes.items()})
        for key, status in seen[-1].items():
            assert (status == psutil.STATUS_STOPPED) == (key != current)
        if sys.platform == "linux":
            for key, process in processes.items():
                with open(f"/proc/{process.pid}/stat") as file:  # noqa: PTH123
                    state = file.read().rsplit(")", 1)[1].split()[0]
                assert (state == "T") == (key != current)

    run_processes(TimeSlicing(1), [(Task(key=key), 3) for key in "abc"], watch=watch)
    assert sum(len(statuses) == 3 for statuses in seen) >= 6


def test_a_stopped_process_does_nothing_even_with_a_token():
    worker = WorkerProcess("w", 2, timeout=0.3)
    try:
        with pytest.raises(WorkerFailed, match="did not answer within 0.3 s"):
            worker.do_unit()
        worker.resume()
        assert worker._report() == (False, expected_result("w", 1)), "it kept the token"
        assert worker.do_unit() == (True, expected_result("w", 2))
    finally:
        worker.end()


@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_process_that_dies_ends_its_own_task_alone(victim):
    """The one that goes on, and one that is stopped."""
    killed = []

    def watch(processes, current):
        if not killed and current == "a" and len(processes) == 3:
            os.kill(processes[victim].pid, signal.SIGKILL)
            killed.append(victim)

    policy = TimeSlicing(2)
    done = run_processes(policy, [(Task(key=key), 6) for key in "abc"], watch=watch)
    assert list(done.failed) == [victim] and "SIGKILL" in done.failed[victim]
    assert set(done.order) == set("abc") - {victim}
    assert done.results == {key: expected_result(key, 6) for key in done.order}
    assert policy.num_tasks == 0
    policy.check_invariants()


def test_a_process_that_hangs_ends_its_own_task_alone():
    def watch(processes, current):
        if current == "a":
            os.kill(processes["a"].pid, signal.SIGSTOP)

    done = run_processes("fcfs", [(Task(key="a"), 3), (Task(key="b"), 2)], timeout=1, watch=watch)
    assert list(done.failed) == ["a"] and "within 1 s" in done.failed["a"]
    assert done.order == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 4])
def test_nobody_is_left_behind_when_something_raises(error, after):
    units = []

    def watch(processes, current):
        units.append(current)
        if len(units) == after:
            raise error

    policy = TimeSlicing(1)
    with pytest.raises(error):
        run_processes(policy, [(Task(key=key), 5) for key in "abc"], watch=watch)
    assert policy.num_tasks == 0, "the policy can be used again"


@pytest.mark.parametrize("at", [0.05, 0.2, 0.4, 0.8])
def test_an_interrupt_at_any_time_leaves_nobody_behind(at):
    """Ctrl-C of a terminal goes to the foreground process group alone, of which the workers are no part."""
    code = (
        "import sys; from minilib.classic.process_queue import run_processes;"
        "from minilib.mechanisms.scheduling import Task; print('begin', flush=True);"
        "run_processes('round_robin', [(Task(key=key), 100_000) for key in 'abc'])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as parent:  # fmt: skip
        parent.stdout.readline()
        time.sleep(at)
        workers = psutil.Process(parent.pid).children()
        os.killpg(parent.pid, signal.SIGINT)
        assert "KeyboardInterrupt" in parent.communicate(timeout=60)[1].decode()
    assert not any(psutil.pid_exists(worker.pid) and worker.is_running() for worker in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is known to hang up stopped orphans at once")
def test_workers_do_not_outlive_a_parent_that_is_killed():
    code = (
        "import time; from minilib.classic.worker_process import WorkerProcess;"
        "w = WorkerProcess('w', 5); print(w.pid, w.status, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as parent:
        pid, status = parent.stdout.readline().split()
        worker = psutil.Process(int(pid))
        assert status.decode() == psutil.STATUS_STOPPED
        parent.kill()
    for _ in range(600):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    worker.kill()
    pytest.fail("a stopped worker outlived its parent")


def test_bad_tasks_and_policies_are_refused_and_no_process_started():
    for units in (0, True, 1.5, math.nan, None, "2"):
        with pytest.raises(ValueError, match="1 unit or more and has a key of its own"):
            run_processes("fcfs", [(Task(key=1), units)])
    for given in ([(Task(key=1), 0)], [(Task(key=1), True)], [(Task(key=1), 1), (Task(key=1), 1)]):
        with pytest.raises(ValueError, match="1 unit or more and has a key of its own"):
            run_processes("fcfs", given)
    with pytest.raises(UnknownPolicy, match="got 'lifo'"):
        run_processes("lifo", [(Task(key=1), 1)])
    with pytest.raises(UnknownTenant, match="'z'"):
        run_processes(FairShare({"a": 1}), [(Task(key=1, tenant="a"), 3), (Task(key=2, tenant="z"), 3)])


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_by_its_name(name):
    done = run_processes(name, [(Task(key=key, predicted=2), 2) for key in "ab"])
    assert sorted(done.order) == ["a", "b"]


@pytest.mark.parametrize("key", ["x" * 2**17, "\0"])
def test_a_key_that_no_program_takes_fails_its_own_task_alone(key):
    """The system takes at most 128 KiB as one argument of a program, and no NUL in it."""
    done = run_processes("fcfs", [(Task(key=key), 2), (Task(key="good"), 2)])
    assert done.order == ["good"] and list(done.failed) == [key] and "cannot be started" in done.failed[key]
