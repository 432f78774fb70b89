"""Shared memory between ranks: tensors that all map, ranks that leave early, and nothing left behind."""

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.replication import plans
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.base import CollectiveFailed, CollectiveMismatch
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.transport.shared_memory import SLOT_BYTES, NotOneHost
from tests.ranks.collective_cases import TRANSPORTS, all_reduce_plans, rooted_plans, values

# Tensors that every rank maps


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_empty_tensors_and_slices_of_them(n):
    def check():
        comm = Communicator(SharedMemoryTransport())
        for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.complex128):
            for numel in (0, 1, n + 1, 6007):
                whole = comm.transport.empty(numel, dtype)
                assert (whole.shape, whole.dtype) == ((numel,), dtype)
                for cut in (slice(None), slice(1, None), slice(numel // 3, -1)):
                    expected = values(numel, dtype)
                    dist.all_reduce(part := expected[cut].clone())
                    expected[cut] = part
                    for plan in all_reduce_plans(n):
                        whole.copy_(values(numel, dtype))
                        comm.all_reduce(whole[cut], plan=plan)
                        assert torch.equal(whole, expected), (dtype, numel, cut, plan)

    run(check, n)


def test_messages_larger_than_all_slots():
    def check():
        comm = Communicator(SharedMemoryTransport())
        numel = 2 * 5 * SLOT_BYTES // 4 + 1
        mapped, plain = comm.transport.empty(numel), values(numel)
        expected = values(numel, rank=0) + values(numel, rank=1)
        for x in (mapped.copy_(plain), plain):
            comm.all_reduce(x)
            assert torch.equal(x, expected)

    run(check, 2)


@pytest.mark.parametrize("n", [2, 3])
def test_every_collective_on_tensors_that_all_map(n):
    def check():
        comm, rank = Communicator(SharedMemoryTransport()), dist.get_rank()
        first, second = comm.transport.empty(3001), comm.transport.empty(3001)
        total = sum(values(3001, rank=other) for other in range(n))
        mine = comm.reduce_scatter(first.copy_(values(3001)))
        assert torch.equal(mine, total.tensor_split(n)[rank])
        comm.all_gather(first)
        assert torch.equal(first, total)
        for root in range(n):
            for plan in rooted_plans("broadcast", n, root):
                # a rank whose tensor is private takes part as well
                x = values(3001) if rank == n - 1 else second.copy_(values(3001))
                comm.broadcast(x, root, plan)
                assert torch.equal(x, values(3001, rank=root))
        outputs = list(second.tensor_split(n))
        sent = [first[: len(outputs[rank])] * (other + 1) for other in range(n)]
        comm.all_to_all(outputs, sent)
        assert all(torch.equal(x, first[: len(x)] * (rank + 1)) for x in outputs)

    run(check, n)


def test_what_was_sent_may_change_at_once():
    """A collective ends on a rank when nobody reads from its tensor any more."""

    def check():
        comm, rank = Communicator(SharedMemoryTransport()), dist.get_rank()
        for x in (comm.transport.empty(300_000), torch.empty(300_000)):
            for turn in range(5):
                x.fill_(turn if rank == 0 else -1)
                if rank == 2:
                    time.sleep(0.02)
                comm.broadcast(x, 0, plans.chain("broadcast", 3, num_chunks=3))
                assert x.unique().tolist() == [turn]

    run(check, 3)


def test_group_transport_has_tensors_of_that_kind_too():
    def check():
        x = GroupTransport().empty(5, torch.int64)
        assert (x.shape, x.dtype) == ((5,), torch.int64)

    run(check, 1)


def test_ranks_that_ask_for_different_tensors():
    def check():
        transport, found = SharedMemoryTransport(timeout=5.0), []
        for numel in (100 + dist.get_rank(), 1, 7):
            try:
                found.append(len(transport.empty(numel)))
            except CollectiveMismatch as error:
                found.append(str(error))
        return found

    first, second = run(check, 2)
    assert first == ["rank 1 shares 404 bytes, this rank 400: all ranks must ask for the same", 1, 7]
    assert second == ["rank 0 shares 400 bytes, this rank 404: all ranks must ask for the same", 1, 7]


def test_a_rank_that_does_not_ask_for_the_tensor():
    def check():
        transport, message = SharedMemoryTransport(timeout=0.3), ""
        if dist.get_rank() == 0:
            try:
                transport.empty(5)
            except CollectiveFailed as error:
                message = str(error)
        dist.barrier()
        return message

    assert run(check, 2) == ["rank 1 has shared no memory for 0.3 s", ""]


# Ranks at different places


def test_a_rank_may_ask_for_a_tensor_while_others_still_receive():
    def check():
        comm = Communicator(SharedMemoryTransport(timeout=10.0))
        x = values(3 * SLOT_BYTES // 4)  # fits into the slots, so that rank 0 is done at once
        if dist.get_rank():
            time.sleep(0.1)
        comm.broadcast(x)
        y = comm.transport.empty(7)
        assert torch.equal(x, values(len(x), rank=0))
        comm.all_reduce(y.fill_(1))
        assert y.tolist() == [3.0] * 7

    run(check, 3)


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_rank_may_leave_while_others_still_receive(kind):
    def check():
        comm = Communicator(TRANSPORTS[kind](timeout=10.0))
        x = values(3 * SLOT_BYTES // 4)
        if dist.get_rank():
            time.sleep(0.1)
        comm.broadcast(x)
        comm.close()
        assert torch.equal(x, values(len(x), rank=0))

    run(check, 3)


def test_hosts_share_no_memory():
    def check():
        socket.gethostname = lambda: f"host-{dist.get_rank()}"
        try:
            SharedMemoryTransport()
        except NotOneHost as error:
            return str(error)

    assert run(check, 2) == ["shared memory needs ranks of one host; these are on 2"] * 2


# Nothing is left


@pytest.mark.parametrize("how", ["close", "end", "die"])
def test_no_file_is_left_whether_ranks_close_end_or_die(how, tmp_path):
    def use():
        tempfile.tempdir = str(tmp_path)
        comm = Communicator(SharedMemoryTransport())
        comm.all_reduce(comm.transport.empty(100_000).fill_(1))
        assert not list(tmp_path.iterdir())
        if how == "close":
            comm.close()
        elif how == "die":
            os._exit(1)

    in_memory = Path("/dev/shm")
    with contextlib.suppress(RankFailed) if how == "die" else contextlib.nullcontext():
        run(use, 2)
    assert not list(tmp_path.iterdir())
    assert not in_memory.exists() or not list(in_memory.glob("*ranks-*"))


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_no_descriptor_and_no_memory_is_left_of_twenty(kind):
    def use():
        counts = []
        for _ in range(20):
            comm = Communicator(TRANSPORTS[kind]())
            x = comm.transport.empty(100_000)
            comm.all_reduce(x.fill_(1))
            comm.close()
            del comm, x
            maps = Path("/proc/self/maps")
            shared = maps.read_text().count("memfd:shared") if maps.exists() else 0
            counts.append((len(list(Path("/dev/fd").iterdir())), shared))
        return counts

    for counts in run(use, 3):
        assert len(set(counts[2:])) == 1, counts
