"""A container from its start to its end: what it says, and that nothing of it stays, however it ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from minilib.classic.container import Container, ContainerLost, NotStarted, run_in_container, supervised
from minilib.mechanisms.basics.child import child_environment
from tests.classic.container import work

ISOLATED = pytest.mark.usefixtures("namespaces")
TIMEOUT = 60


def until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.01)


@ISOLATED
def test_a_commands_status_and_output():
    assert run_in_container(["true"]).status == 0
    result = run_in_container(["sh", "-c", "echo out; echo error >&2; exit 7"], hostname="box")
    assert (result.status, result.output, result.value) == (7, "out\nerror\n", None)
    assert run_in_container(["sh", "-c", "exec hostname"], hostname="box").output == "box\n"


@ISOLATED
def test_a_command_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        run_in_container(["/no-such-command"])
    (tmp_path / "text").write_text("")
    with pytest.raises(PermissionError):
        run_in_container([str(tmp_path / "text")])


@ISOLATED
def test_a_function_returns_what_it_likes():
    here = {"a": [1, (2, None)]}
    result = run_in_container(lambda: (here, os.getpid(), print("said")))
    assert (result.status, result.value, result.output) == (0, (here, 1, None), "said\n")
    assert run_in_container(lambda: bytes(10**7)).value == bytes(10**7)


@ISOLATED
@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("words", 1)])
def test_a_function_that_exits(code, status):
    result = run_in_container(lambda: sys.exit(code))
    assert (result.status, result.output) == (status, "words\n" if code == "words" else "")
    assert run_in_container(lambda: os._exit(status)).status == status


@ISOLATED
def test_a_function_that_raises_tells_where():
    result = run_in_container(lambda: {}["missing"])
    assert (result.status, result.value) == (1, None)
    assert "KeyError: 'missing'" in result.output and "Traceback" in result.output
    unpicklable = run_in_container(lambda: threading.Lock())
    assert (unpicklable.status, unpicklable.value) == (1, None) and "cannot pickle" in unpicklable.output


@ISOLATED
def test_a_container_inherits_nothing_that_is_open(tmp_path):
    assert run_in_container(["cat"]).output == "", "its input is empty"
    with (tmp_path / "file").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        opened = run_in_container(["ls", "/proc/self/fd"]).output.split()
    assert opened == ["0", "1", "2", "3"], "3 is the folder that ls reads"


@ISOLATED
def test_a_command_dies_of_a_broken_pipe_as_commands_do():
    """Python ignores SIGPIPE, and `yes` would write on."""
    assert run_in_container(["sh", "-c", "yes | true; true"]).output == ""


@ISOLATED
@pytest.mark.parametrize("hanging", [work.hang, work.hang_with_a_child, ["sleep", "1000"]])
def test_one_that_hangs_is_killed_when_its_time_is_over(hanging):
    result = run_in_container(hanging, timeout=1)
    assert result.timed_out and (result.status, result.value) == (-9, None)


@ISOLATED
def test_a_start_that_takes_too_long_is_named(monkeypatch):
    monkeypatch.setattr(supervised, "_PATIENCE", 1e-6)
    with pytest.raises(NotStarted, match="not begun its work within 1e-06 s"):
        run_in_container(work.hang)


@ISOLATED
def test_a_body_that_raises_ends_the_container():
    with pytest.raises(KeyError), Container(work.hang) as container:
        raise KeyError
    assert not psutil.pid_exists(container.pid)


@ISOLATED
def test_an_interrupt_while_waiting_ends_the_container():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interrupts
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    with pytest.raises(KeyboardInterrupt), Container(work.hang) as container:
        timer.start()
        container.wait()
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert not psutil.pid_exists(container.pid)


@ISOLATED
def test_one_that_is_killed_from_outside_says_so():
    with Container(work.hang) as container:
        os.kill(container.pid, signal.SIGKILL)
        result = container.wait()
        assert (result.status, result.timed_out) == (-9, False)


@ISOLATED
def test_without_its_supervisor_a_container_does_not_live():
    with Container(work.hang_with_a_child) as container:
        first = psutil.Process(container.pid)
        first.parent().kill()
        with pytest.raises(ContainerLost, match="supervisor"):
            container.wait()
        until(lambda: not psutil.pid_exists(container.pid))


@ISOLATED
@pytest.mark.usefixtures("pids")
def test_without_its_parent_a_container_does_not_live_and_its_group_is_removed():
    code = (
        "from minilib.classic.container import Container; from tests.classic.container import work; import time\n"
        "with Container(work.hang_with_a_child, pids=9) as c:\n"
        "    print(c.pid, c.cgroup.folders['pids'], flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=child_environment(), stdout=subprocess.PIPE, text=True)
    with parent:
        pid, folder = parent.stdout.readline().split()
        assert psutil.pid_exists(int(pid)) and Path(folder).is_dir()
        parent.kill()
    until(lambda: not psutil.pid_exists(int(pid)) and not Path(folder).exists())


@ISOLATED
def test_two_at_once_are_both_number_one():
    with Container(os.getpid, hostname="a") as one, Container(os.getpid, hostname="b") as other:
        assert one.pid != other.pid
        assert one.wait().value == other.wait().value == 1


@ISOLATED
def test_a_thread_may_start_one_and_end():
    found = []

    def start():
        found.append(Container(["sleep", "0.2"]).__enter__())

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    result = found[0].wait()
    found[0].__exit__(None, None, None)
    assert result.status == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"hostname": ""}, "a hostname has 1 to 64 bytes"),
        ({"hostname": "ä" * 33}, "a hostname has 1 to 64 bytes"),
        ({"timeout": 0}, "a timeout is"),
        ({"timeout": float("nan")}, "a timeout is"),
        ({"timeout": float("inf")}, "a timeout is"),
    ],
)
def test_what_no_container_can_have_is_named(how, said):
    with pytest.raises(ValueError, match=said):
        run_in_container(int, **how)


@pytest.mark.parametrize("command", ["ls -l", [], [1], [b"ls"], 5, None, [""], ["a\0b"], iter(["ls"])])
def test_a_command_that_is_no_list_of_words_is_named(command):
    with pytest.raises(ValueError, match="a command is a list of words"):
        run_in_container(command)


@ISOLATED
def test_whoever_waits_twice_is_told_the_same_twice():
    with Container(lambda: 7, timeout=TIMEOUT) as container:
        first = container.wait()
        assert container.wait() == first and (first.value, first.timed_out) == (7, False)


@ISOLATED
def test_before_its_body_there_is_nothing_to_wait_for_and_after_it_nothing_is_left():
    container = Container(int)
    for ask in (container.kill, container.wait, lambda: container.pid, lambda: container.cgroup):
        with pytest.raises(NotStarted, match="has not been started"):
            ask()
    with container:
        assert container.wait().value == 0
    container.kill()
    with pytest.raises(ContainerLost, match="at the end of its body"):
        container.wait()
    with container:
        assert container.wait().value == 0, "it may run again"


@ISOLATED
def test_one_that_runs_is_not_started_a_second_time():
    with Container(work.hang) as container:
        pid = container.pid
        with pytest.raises(ValueError, match="runs already"):
            container.__enter__()
        assert container.pid == pid and psutil.pid_exists(pid)


@ISOLATED
def test_a_timeout_may_be_longer_than_poll_waits():
    assert run_in_container(int, timeout=1e12).status == 0


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"hostname": None}, ValueError),
        ({"hostname": "a\0b"}, ValueError),
        ({"timeout": "1"}, ValueError),
        ({"timeout": True}, ValueError),
        ({"root": Path("/")}, TypeError),
    ],
)
def test_what_is_of_another_type_is_named(how, error):
    with pytest.raises(error, match=r"a (hostname|timeout|root) "):
        run_in_container(int, **how)
