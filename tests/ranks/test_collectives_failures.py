"""Whatever goes wrong on one rank, the others hear of it in time, by name; a communicator that failed says why."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.replication import plans
from minilib.ranks import collectives
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport import group, shared
from minilib.ranks.transport.base import CollectiveFailed
from tests.ranks.collective_cases import TRANSPORTS, values

LARGE = 3 * 2**21  # values: 8 MiB for each of 3 ranks, some segments and more slots


def failure(call, *args) -> tuple[str, str, float]:
    """Name and message of what a collective raises, and after how many seconds."""
    started = time.monotonic()
    try:
        call(*args)
    except CollectiveFailed as error:
        return type(error).__name__, str(error), time.monotonic() - started
    raise AssertionError("no failure")


# What differs on rank 0


def other_shape(comm, odd):
    comm.all_reduce(torch.ones(7 if odd else 6))


def other_shape_of_one_size(comm, odd):
    comm.all_reduce(torch.ones((2, 3) if odd else (3, 2)))


def larger_than_the_place_for_it(comm, odd):
    comm.broadcast(torch.ones(LARGE if odd else LARGE // 2))


def other_dtype(comm, odd):
    comm.all_reduce(torch.ones(6, dtype=torch.int32 if odd else torch.float32))


def other_operation(comm, odd):
    comm.all_reduce(torch.ones(6), "max" if odd else "sum")


def other_cut(comm, odd):
    comm.all_reduce(torch.ones(600), plan=plans.chain("all_reduce", 3, num_chunks=2 + odd))


def other_collective(comm, odd):
    comm.all_gather(torch.ones(6)) if odd else comm.reduce_scatter(torch.ones(6))


def other_sizes(comm, odd):
    comm.all_to_all(list(torch.ones(6).split(2)), [torch.ones(2), *(torch.ones(2 - odd) for _ in "12")])


def a_missing_call(comm, odd):
    if not odd:
        comm.all_reduce(torch.ones(6))
    comm.barrier()


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_ranks_that_do_not_agree(kind):
    cases = (
        (other_shape, "torch.float32 (6,)", "torch.float32 (7,)"),
        (other_shape_of_one_size, "(3, 2)", "(2, 3)"),
        (larger_than_the_place_for_it, f"broadcast tree/1 torch.float32 ({LARGE // 2},)", f"({LARGE},)"),
        (other_dtype, "torch.float32", "torch.int32"),
        (other_operation, "all_reduce sum", "all_reduce max"),
        (other_cut, "chain/2", "chain/3"),
        (other_collective, "reduce_scatter", "all_gather"),
        (other_sizes, "8 bytes", "4 bytes"),
        (a_missing_call, "call 2, all_reduce sum tree/1 torch.float32", "torch.uint8"),
    )

    def attempts():
        collectives.GRACE = 0.0
        found = []
        for wrong, *_ in cases:
            comm = Communicator(TRANSPORTS[kind](timeout=20.0))
            comm.all_reduce(values(101))
            found.append((*failure(wrong, comm, dist.get_rank() == 0), failure(comm.barrier)[1]))
        return found

    for (wrong, *words), *ranks in zip(cases, *run(attempts, 3), strict=True):
        mismatches = [message for name, message, _, _ in ranks if name == "CollectiveMismatch"]
        assert any(all(word in message for word in words) for message in mismatches), ranks
        for _, message, seconds, again in ranks:
            assert seconds < 10, (wrong, message)  # long before the timeout: who fails hangs up
            assert again.endswith(f"an earlier call failed: {message}"), (wrong, again)


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_plans_under_which_ranks_wait_for_each_other(kind):
    def attempt():
        comm = Communicator(TRANSPORTS[kind](timeout=0.5))
        plan = plans.star("all_reduce", 3) if dist.get_rank() == 0 else plans.ring("all_reduce", 3)
        return failure(lambda: comm.all_reduce(values(101), plan=plan))

    for _, message, seconds in run(attempt, 3):
        assert seconds < 10, message


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_rank_that_does_not_come(kind):
    def attempt():
        comm = Communicator(TRANSPORTS[kind](timeout=0.5))
        comm.all_reduce(values(101))
        found = failure(comm.all_reduce, values(LARGE)) if dist.get_rank() else None
        dist.barrier()
        return found

    _, *ranks = run(attempt, 3)
    assert any(message.startswith("rank 1 has ") and "from rank 0" in message for _, message, _ in ranks)
    for _, message, seconds in ranks:
        assert 0.4 < seconds < 10, message


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_in_the_background_the_wait_raises(kind):
    def attempt():
        comm = Communicator(TRANSPORTS[kind](timeout=20.0))
        ring = plans.ring("all_reduce", 2)  # in which both ranks receive first, so that both see the mismatch
        pending = [comm.all_reduce(torch.ones(6 + dist.get_rank()), plan=ring, async_op=True) for _ in range(3)]
        found = [failure(each.wait)[1] for each in (*pending, pending[0])]
        return [*found, failure(comm.barrier)[1], failure(lambda: comm.barrier())[1]]

    for first, second, third, again, *later in run(attempt, 2):
        assert first == again and "torch.float32 (6,)" in first
        assert all(f"an earlier call failed: {first}" in message for message in (second, third, *later))


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_an_error_of_ones_own_breaks_it_too(kind):
    def attempt():
        comm = Communicator(TRANSPORTS[kind](timeout=2.0))  # which gloo takes to notice that the rest will not come
        if dist.get_rank():
            return failure(comm.all_reduce, values(LARGE))[1]
        in_the_middle(lambda: 1 / 0)
        try:
            comm.all_reduce(values(LARGE))
        except ZeroDivisionError:
            return failure(comm.barrier)[1]

    first, *others = run(attempt, 3)
    assert "an earlier call failed: division by zero (in call 1, all_reduce" in first
    assert all("is gone" in message or "no answer" in message for message in others)


# Ranks that end


def in_the_middle(do) -> None:
    """Have this rank do something when it combines what has come for the second time."""
    pieces, take = [], group.take

    def counted(*args):
        pieces.append(0)
        if len(pieces) == 2:
            do()
        take(*args)

    group.take = shared.take = counted


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os._exit(3), "rank 1 of 3 exited with code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 of 3 was killed by SIGKILL"),
        (lambda: [][0], "rank 1 of 3 failed:(.|\n)*IndexError"),
    ],
    ids=["exits", "is killed", "raises"],
)
def test_a_rank_that_ends_in_the_middle_is_the_one_that_launch_names(kind, end, says):
    def attempt():
        comm = Communicator(TRANSPORTS[kind](timeout=20.0))
        if dist.get_rank() == 1:
            in_the_middle(end)
        comm.all_reduce(values(LARGE))

    started = time.monotonic()
    with pytest.raises(RankFailed, match=f"^{says}") as caught:
        run(attempt, 3)
    assert caught.value.rank == 1
    assert time.monotonic() - started < 15
