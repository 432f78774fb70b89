"""However a call of `launch.run` ends, nothing of it is left: no process, no folder, no file descriptor."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from minilib.ranks.launch import RankFailed, RanksTimedOut, local, run
from tests.ranks.launch.scripts import SCRIPTS, environment


def left_behind() -> dict:
    this = psutil.Process()
    return {
        "files": this.num_fds(),
        "processes": len(this.children(recursive=True)),  # the fork server and multiprocessing's resource tracker
        "folders": list(Path(tempfile.gettempdir()).glob("minilib-ranks-*")),
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch, tmp_path_factory):
    run(int, 1)  # the fork server may start, and stays
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))  # of no other process
    before = left_behind()
    yield
    assert left_behind() == before


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie that waits for a negligent parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_nothing_is_left_of_twenty_calls():
    endings = [
        lambda: torch.ones(10),
        lambda: 1 / dist.get_rank(),
        lambda: os._exit(1),
        lambda: time.sleep(60),
        lambda: (x for x in ()),
    ]
    ended = []
    for number in range(20):
        try:
            run(endings[number % 5], 2, timeout=20.0 if number % 5 != 3 else 0.2)
            ended.append("value")
        except (RankFailed, RanksTimedOut) as error:
            ended.append(type(error).__name__)
    assert ended == ["value", "RankFailed", "RankFailed", "RanksTimedOut", "ReturnNotPicklable"] * 4


def test_ranks_end_quietly_with_their_groups_and_messages_still_there(capfd):
    def leaves_all_open(kept=[]):  # noqa: B006 - what is in it lives until the process ends
        rank = dist.get_rank()
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        dist.all_reduce(torch.ones(1000), group=halves[rank // 2])
        kept.append((halves, dist.isend(torch.ones(1_000_000), rank ^ 1), dist.irecv(torch.ones(1), (rank + 2) % 4)))
        return os.getpid()

    for _ in range(3):
        assert not any(runs(pid) for pid in run(leaves_all_open, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_children_of_ranks_end_with_them(fails, tmp_path):
    def spawn():
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        if fails:
            os._exit(1)

    with pytest.raises(RankFailed) if fails else contextlib.nullcontext():
        run(spawn, 1)
    child = int((tmp_path / "pid").read_text())
    assert eventually(lambda: not runs(child))


@pytest.fixture
def interruptible():
    """What a shell runs in its background ignores SIGINT, and so do the tests then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_ranks_and_the_next_call_works(tmp_path):
    def sleep():
        (tmp_path / str(dist.get_rank())).touch()
        time.sleep(60)

    def interrupt():
        eventually(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(sleep, 2)
    assert signal.getsignal(signal.SIGINT) is handler
    assert run(int, 2) == [0, 0]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["start", "end", "show_output"])
def test_an_interrupt_is_kept_until_it_is_safe(step, monkeypatch):
    real = getattr(local.Ranks, step)

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        real(self, *args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(local.Ranks, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(time.sleep, 2, 60 if step == "start" else 0)


def test_ranks_end_when_the_process_that_started_them_is_killed(tmp_path_factory):
    temporary, pids = tmp_path_factory.mktemp("t"), tmp_path_factory.mktemp("pids")  # a socket's path must be short
    command = [sys.executable, SCRIPTS / "killed.py", pids]
    parent = subprocess.Popen(command, env=environment(TMPDIR=str(temporary)))
    try:
        assert eventually(lambda: sum(bool(file.read_text()) for file in pids.iterdir()) == 2, 90)
        assert list(temporary.glob("minilib-ranks-*"))
        everyone = psutil.Process(parent.pid).children(recursive=True)
        assert {int(file.read_text()) for file in pids.iterdir()} < {process.pid for process in everyone}
    finally:
        parent.kill()
        parent.wait()
    assert eventually(lambda: not any(runs(process.pid) for process in everyone))
    assert not list(temporary.glob("minilib-ranks-*"))


def test_a_temporary_folder_with_too_long_a_path_is_named(tmp_path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    command = [sys.executable, SCRIPTS / "killed.py", tmp_path]
    ended = subprocess.run(command, env=environment(TMPDIR=str(folder)), capture_output=True, text=True, timeout=90)
    assert "TemporaryFolderTooLong" in ended.stderr and f"lie in {folder}, whose path is too long" in ended.stderr
    assert list(folder.glob("minilib-ranks-*")) == []


def test_a_fork_server_that_is_killed_is_replaced():
    [server] = run(os.getppid, 1)

    def kill_the_server():
        os.kill(server, signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankFailed, match="rank 0 of 1 vanished: the fork server that started it is gone"):
        run(kill_the_server, 1)
    assert eventually(lambda: not runs(server))
    [successor] = run(os.getppid, 1)
    assert successor != server
