"""Run a function on N ranks: from a notebook, a script or a test on this machine, or under torchrun on many."""

from __future__ import annotations

import atexit
import base64
import math
import os
import pickle
from collections.abc import Callable

from minilib.mechanisms.basics.checks import is_whole
from minilib.ranks.launch import local
from minilib.ranks.launch.errors import NestedRun, RankFailed
from minilib.ranks.launch.group import call, failure, join, leave, place_of_attempt, returned, running

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")  # what it puts in the environment
FAILURE = "minilib.ranks.launch/failure"  # the key under which the first rank to fail says so


def run(
    fn: Callable,
    world_size: int | None,
    *args,
    timeout: float | None = None,
    backend: str = "gloo",
    threads: int = 1,
) -> list:
    """Run `fn(*args)` on `world_size` ranks, with torch.distributed initialised, and return what each rank returns.

    The ranks are new processes on this machine; cloudpickle sends them `fn` and `args`, so `fn` may be a lambda, a
    closure, or defined in a notebook cell. What ranks print is printed here after they have ended, rank by rank. No
    rank and no child process of a rank outlives the call. Ranks see the current os.environ; variables that torch and
    triton read at import, such as TRITON_INTERPRET, are fixed by the first call.

    Under torchrun the ranks are the processes that torchrun started: every process makes the same call, runs `fn`
    itself, and gets the values of all ranks. Later calls use the same group, with the timeout of the first.

    Args:
        fn: called once on every rank.
        world_size: number of ranks; under torchrun, None or the number that torchrun started.
        args: positional arguments of `fn`, the same on every rank.
        timeout: seconds from the start of the last rank until all ranks must have returned. None sets no limit to
            `fn`, so training may take hours; a rank that waits for others in a collective of the default group still
            raises after 60 s, which is a RankFailed. Under torchrun, seconds that such a rank waits, 60 for None.
        backend: of torch.distributed, "gloo" or "nccl"; with the latter, a rank uses the GPU numbered LOCAL_RANK.
        threads: torch's threads in each rank.

    Returns:
        The value of `fn` on rank 0, 1, …; tensors arrive as copies.

    Raises:
        RankFailed: if a rank raises or dies; it holds the first rank's own traceback, and the others are killed. Under
            torchrun only the failing rank raises it at once, others when they next wait for a rank that is gone. The
            group is of no use after that.
        ReturnNotPicklable: a RankFailed, if what a rank returns does not pickle.
        RanksTimedOut: if ranks have not returned within `timeout`; it says which, and where each was.
        NestedRun: if called on a rank.
        WorkingFolderGone: if the working folder of this process was deleted.
        TemporaryFolderTooLong: if TMPDIR leaves no room for a socket's path.
        TypeError: if `fn` is not callable, or does not pickle with its arguments.
        ValueError: if another argument is out of range, or `world_size` is not torchrun's.

    Cost:
        about 0.03 s for 1 rank, 0.08 s for 4 on two idle cores; in each process that calls it, once 2 s more, to load
        torch. A rank that imports `minilib.ranks.collectives` takes 0.02 s for that.
    """
    under_torchrun = all(name in os.environ for name in TORCHRUN)
    if running.get() is not None:
        raise NestedRun(f"run() was called on rank {running.get()}: call it outside the function that ranks run")
    _check(fn, world_size, timeout, threads, under_torchrun)
    if under_torchrun:
        return _run_under_torchrun(fn, args, timeout, backend, threads)
    return local.run_ranks(fn, args, world_size, timeout=timeout, backend=backend, threads=threads)


def hosts() -> list[int]:
    """For every rank, the number of the host that it runs on. A collective: every rank must call it.

    Returns:
        [0, 0, 1, 1] for two hosts with two ranks each; on one machine, all zeros.

    Raises:
        RuntimeError: if called outside a rank.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        raise RuntimeError("hosts() tells ranks where they are: call it in a function that run() runs")
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, int(os.environ.get("GROUP_RANK", "0")))  # torchrun numbers its hosts
    return numbers


def _check(fn: Callable, world_size: int | None, timeout: float | None, threads: int, under_torchrun: bool) -> None:
    if not callable(fn):
        raise TypeError(f"fn is the function to run, got {fn!r}, a {type(fn).__name__}: pass fn, not fn()")
    if under_torchrun:
        expected = int(os.environ["WORLD_SIZE"])
        if world_size not in (None, expected):
            raise ValueError(
                f"world_size is {world_size!r}, but torchrun started WORLD_SIZE={expected} ranks: pass None"
            )
    elif not is_whole(world_size, 1):
        raise ValueError(
            f"world_size is the number of ranks, an int of at least 1 (or None under torchrun), got {world_size!r}"
        )
    if not is_whole(threads, 1):
        raise ValueError(f"threads is the number of torch's threads per rank, an int of at least 1, got {threads!r}")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(f"timeout is in seconds, positive and finite, or None for no limit, got {timeout!r}")


def _run_under_torchrun(fn: Callable, args: tuple, timeout: float | None, backend: str, threads: int) -> list:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if not dist.is_initialized():
        limit = local.COLLECTIVE_TIMEOUT if timeout is None else timeout
        join(backend, limit, **place_of_attempt(limit))
        atexit.register(leave)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    values: list[bytes] = [b""] * world_size
    try:
        dist.all_gather_object(values, call(fn, args, rank, world_size))
    except Exception as error:
        raise _first_failure(failure(error, rank, world_size)) from error
    return [returned(content, number, world_size) for number, content in enumerate(values)]


def _first_failure(own: RankFailed) -> RankFailed:
    """Which rank failed first: the group's store, which outlives its connections, keeps what the first one wrote."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        first = _get_default_store().compare_set(FAILURE, "", base64.b64encode(pickle.dumps(own)).decode())
    except RuntimeError:  # rank 0 kept the store and is gone
        return own
    return pickle.loads(base64.b64decode(first))
