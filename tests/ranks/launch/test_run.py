import ast
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minilib.ranks import launch
from minilib.ranks.launch import NestedRun, RankFailed, RanksTimedOut, ReturnNotPicklable, WorkingFolderGone, run

# What comes back


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_returns_its_value_and_the_group_works(world_size):
    def total(factor):
        x = torch.arange(3.0) + dist.get_rank()
        dist.all_reduce(x)
        return dist.get_rank(), dist.get_world_size(), x * factor

    values = run(total, world_size, 10)
    expected = sum(torch.arange(3.0) + rank for rank in range(world_size)) * 10
    assert [value[:2] for value in values] == [(rank, world_size) for rank in range(world_size)]
    assert all(torch.equal(value[2], expected) for value in values)


def test_a_tensor_comes_back_as_a_value():
    weight = torch.nn.Parameter(torch.ones(1000))
    values = run(lambda: weight * (dist.get_rank() + 1), 2)
    assert [value.sum().item() for value in values] == [1000, 2000]
    assert not any(value.is_shared() for value in values)


def test_a_function_may_name_an_attribute_as_a_part_of_torch_is_named():
    """Cloudpickle takes `model.ops` beside `torch` for torch.ops and ships that as well, a module of its own kind."""

    def with_ops(model):
        return torch.ones(2).sum().item() + model.ops + (torch.ops.aten.add is not None)

    assert run(with_ops, 1, SimpleNamespace(ops=3)) == [6]


def test_hosts_are_one_on_one_machine():
    assert run(launch.hosts, 2) == [[0, 0], [0, 0]]
    with pytest.raises(RuntimeError, match="in a function that run"):
        launch.hosts()


def test_ranks_see_this_process_as_it_is_now(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILIB_TEST", "later than the fork server")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "written_just_now.py").write_text("x = 7")

    def seen():
        import written_just_now

        return os.environ["MINILIB_TEST"], os.environ["LOCAL_RANK"], str(Path.cwd()), written_just_now.x

    assert run(seen, 2) == [("later than the fork server", rank, str(tmp_path), 7) for rank in "01"]


def test_gloo_listens_on_loopback_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert run(os.getenv, 1, "GLOO_SOCKET_IFNAME")[0] in ("lo", "lo0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(RankFailed, match="no-such-interface"):
        run(os.getenv, 1, "GLOO_SOCKET_IFNAME")


def test_ranks_have_the_threads_they_are_given_and_random_numbers_of_their_own():
    import numpy

    def draw():
        return torch.get_num_threads(), torch.rand(1).item(), numpy.random.rand()

    (threads, *first), (_, *second) = run(draw, 2, threads=2)
    assert threads == 2
    assert not set(first) & set(second)
    assert run(torch.get_num_threads, 1) == [1]


def test_what_ranks_print_is_printed_rank_by_rank(capfd):
    def speak():
        time.sleep(0.1 * (1 - dist.get_rank()))  # rank 1 speaks first
        print(f"rank {dist.get_rank()} says ü")
        os.system("echo its child, too")
        print("a complaint", file=sys.stderr)
        assert sys.stdin.read() == "" if sys.stdin else True

    run(speak, 2)
    captured = capfd.readouterr()
    assert captured.out == "rank 0 says ü\nits child, too\nrank 1 says ü\nits child, too\n"
    assert captured.err == "a complaint\n" * 2


def test_two_calls_at_once_do_not_meet():
    def total(x):
        y = torch.tensor([float(x)])
        dist.all_reduce(y)
        return y.item()

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(run, total, 2, x) for x in range(6)]
        assert [call.result() for call in calls] == [[2.0 * x] * 2 for x in range(6)]


def test_a_fork_of_this_process_runs_ranks_of_its_own():
    servers = run(os.getppid, 1)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.write(writer, repr(run(os.getppid, 2) + run(os.getppid, 1)).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        first, *others = ast.literal_eval(pipe.read())
    assert others == [first] * 2 and first not in servers
    assert run(os.getppid, 1) == servers


# Failures


def test_the_first_failure_is_reported_not_what_came_of_it(capfd):
    def unlucky():
        if dist.get_rank() == 2:
            print("about to fail")
            raise ValueError("out of luck")
        dist.barrier()

    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run(unlucky, 3)
    assert time.monotonic() - started < 10
    assert caught.value.rank == 2
    message = str(caught.value)
    assert message.startswith("rank 2 of 3 failed:\nTraceback")
    assert message.endswith("ValueError: out of luck")
    assert 'raise ValueError("out of luck")' in message
    assert message.count('File "') == 1, "frames of launch are left out"
    assert capfd.readouterr().out == "about to fail\n"


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os._exit(3), "exited with code 3 before its function returned"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL, as the system does when memory"),
        (lambda: ctypes.string_at(0), r"was killed by SIGSEGV(.|\n)*in string_at\n(.|\n)*in unlucky"),
        (os.abort, "was killed by SIGABRT"),
        (lambda: sys.exit(4), r"failed:\n(.|\n)*SystemExit: 4"),
    ],
    ids=["exit", "SIGKILL", "SIGSEGV", "SIGABRT", "sys.exit"],
)
def test_a_rank_that_dies_is_named_though_its_death_breaks_others(die, how):
    def unlucky():
        dist.barrier()
        if dist.get_rank() == 1:
            die()
        dist.barrier()

    with pytest.raises(RankFailed, match=f"^rank 1 of 3 {how}") as caught:
        run(unlucky, 3)
    assert caught.value.rank == 1


def test_ranks_that_hang_are_named_with_the_line_where_they_hang():
    def wait_for_rank_1():
        if dist.get_rank() != 1:
            dist.recv(torch.zeros(1), 1)

    started = time.monotonic()
    with pytest.raises(RanksTimedOut) as caught:
        run(wait_for_rank_1, 3, timeout=1.5)
    assert time.monotonic() - started < 10
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.ranks == (0, 2)
    message = str(caught.value)
    assert message.startswith("2 of 3 ranks had not returned after 1.5 s\nrank 0 was here:")
    assert message.count("in wait_for_rank_1\n    dist.recv(torch.zeros(1), 1)") == 2
    assert "launch/rank.py" not in message


def test_without_a_timeout_a_function_takes_as_long_as_it_likes(monkeypatch):
    monkeypatch.setattr(launch.local, "COLLECTIVE_TIMEOUT", 0.3)
    assert run(time.sleep, 1, 1.0) == [None]
    with pytest.raises(RanksTimedOut, match="1 of 1 ranks had not returned after 0.3 s"):
        run(time.sleep, 1, 60, timeout=0.3)


def test_without_a_timeout_a_collective_that_hangs_raises(monkeypatch):
    monkeypatch.setattr(launch.local, "COLLECTIVE_TIMEOUT", 5.0)

    def wait_for_rank_1():
        if dist.get_rank() == 0:
            dist.recv(torch.zeros(1), 1)

    with pytest.raises(RankFailed, match=r"^rank 0 of 2 failed:(.|\n)*in wait_for_rank_1(.|\n)*5000 ?ms"):
        run(wait_for_rank_1, 2)


def test_a_rank_that_holds_the_interpreters_lock_ends_itself_at_last(monkeypatch):
    monkeypatch.setattr(launch.local, "STANDSTILL", 2.0)

    def hold():
        ctypes.PyDLL(None).sleep(60)

    with pytest.raises(RankFailed, match=r"^rank 0 of 1 exited with code 1 before its function returned(.|\n)*in hold"):
        run(hold, 1)
    assert run(time.sleep, 1, 3.0) == [None]  # lets other threads have their turns


def test_a_rank_that_is_stopped_times_out_too():
    with pytest.raises(RanksTimedOut, match="rank 0 was here: not known, it did not answer"):
        run(lambda: os.kill(os.getpid(), signal.SIGSTOP), 1, timeout=0.3)


def test_a_value_that_does_not_pickle_is_named():
    with pytest.raises(ReturnNotPicklable, match="rank 1 of 2 returned a generator that cannot be pickled") as caught:
        run(lambda: (x for x in ()) if dist.get_rank() else 0, 2)
    assert isinstance(caught.value, RankFailed) and caught.value.rank == 1


class OnlyThere:
    """Pickles on a rank; here it does not unpickle."""

    def __reduce__(self):
        return only_there, (os.getpid(),)


def only_there(pid: int) -> None:
    if os.getpid() != pid:
        raise RuntimeError("not here")


def test_a_value_that_does_not_unpickle_is_named():
    with pytest.raises(
        ReturnNotPicklable, match="rank 0 of 1 returned a value that cannot be unpickled here.*not here"
    ):
        run(OnlyThere, 1)


def test_a_run_within_a_run_is_refused():
    with pytest.raises(RankFailed, match="NestedRun: run.. was called on rank 0: call it outside"):
        run(lambda: run(int, 1), 1)
    assert issubclass(NestedRun, RuntimeError)


def test_an_unknown_backend_is_torchs_to_refuse():
    with pytest.raises(RankFailed, match="rank 0 of 1 failed(.|\n)*carrier-pigeon"):
        run(int, 1, backend="carrier-pigeon")


def test_a_deleted_working_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(WorkingFolderGone, match="working folder of this process was deleted.*os.chdir"):
        run(int, 1)


@pytest.mark.parametrize("world_size", [0, -1, 2.0, True, "2", None])
def test_the_number_of_ranks_must_be_one(world_size):
    with pytest.raises(ValueError, match=f"int of at least 1 .or None under torchrun., got {world_size!r}"):
        run(int, world_size)


def test_other_arguments_must_make_sense():
    with pytest.raises(TypeError, match="got 3, a int: pass fn, not fn()"):
        run(3, 1)
    with pytest.raises(TypeError, match="int, with its arguments, must be picklable.*lock"):
        run(int, 1, threading.Lock())
    with pytest.raises(ValueError, match="threads is the number"):
        run(int, 1, threads=0)
    for timeout in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout is in seconds"):
            run(int, 1, timeout=timeout)
