"""Every collective, by every plan, over both transports, against torch.distributed's own; inputs differ per rank."""

import pytest
import torch
import torch.distributed as dist

from minilib.ranks.collectives import chunk_of
from minilib.ranks.launch import run
from minilib.ranks.transport.shared_memory import SLOT_BYTES
from tests.ranks.collective_cases import (
    CARRIED,
    TORCH,
    all_reduce_plans,
    communicators,
    rooted_plans,
    same_everywhere,
    values,
)

WORLD_SIZES = (1, 2, 3, 4)


def lengths(n: int) -> list[int]:
    return [0, 1, *{max(1, n - 1), n, n + 1}, 101, 6007]


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_all_reduce_by_every_plan(n):
    def check():
        for name, comm in communicators().items():
            for numel in lengths(n):
                expected = values(numel)
                dist.all_reduce(expected)
                for plan in all_reduce_plans(n):
                    x = values(numel)
                    assert comm.all_reduce(x, plan=plan) is None
                    assert torch.equal(x, expected), (name, numel, plan)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_all_reduce_of_every_dtype_by_every_operation(n):
    def check():
        comms = communicators()
        for dtype, ops in CARRIED.items():
            for op in ops:
                expected = values(1009, dtype)
                dist.all_reduce(expected, TORCH[op])
                for name, comm in comms.items():
                    x = values(1009, dtype)
                    comm.all_reduce(x, op)
                    assert torch.equal(x, expected), (name, dtype, op)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_messages_of_several_slots(n):
    """The largest message of each plan is a slot, or one element more or less."""

    def check():
        plans = {plan.name: plan for plan in all_reduce_plans(n) if plan}
        comms = communicators().values()
        for dtype, more in ((torch.uint8, (-1, 0, 1)), (torch.float64, (1,))):
            for name, messages in (("ring", n), ("star", 1), ("recursive-doubling", 1)):
                for numel in (messages * SLOT_BYTES // dtype.itemsize + few for few in more):
                    expected = values(numel, dtype)
                    dist.all_reduce(expected)
                    for comm in comms:
                        x = values(numel, dtype)
                        comm.all_reduce(x, plan=plans.get(name))
                        assert torch.equal(x, expected), (comm.transport, name, numel, dtype)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_the_same_bits_everywhere_whatever_the_order_of_addition(n):
    def check():
        torch.manual_seed(dist.get_rank())
        for name, comm in communicators().items():
            for dtype in (torch.float32, torch.bfloat16):
                for plan in all_reduce_plans(n):
                    mine = torch.randn(1013, dtype=dtype)
                    x, exact = mine.clone(), mine.double()
                    comm.all_reduce(x, "avg", plan)
                    dist.all_reduce(exact, dist.ReduceOp.AVG)
                    assert same_everywhere(x), (name, dtype, plan)
                    torch.testing.assert_close(x, exact.to(dtype), rtol=0, atol=8 * torch.finfo(dtype).eps)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_reduce_scatter_and_all_gather(n):
    def check():
        rank = dist.get_rank()
        for comm in communicators().values():
            for numel in (*lengths(n), 2 * SLOT_BYTES // 8 + 1):
                for op in ("sum", "avg", "max"):
                    total, x = values(numel, torch.float64), values(numel, torch.float64)
                    dist.all_reduce(total, TORCH[op])
                    mine = comm.reduce_scatter(x, op)
                    assert mine.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
                    assert torch.equal(mine, total.tensor_split(n)[rank]), (comm.transport, numel, op)
                assert torch.equal(chunk_of(x, rank, n), mine)
                for other in set(range(n)) - {rank}:
                    chunk_of(x, other, n).fill_(-1)
                assert comm.all_gather(x) is None
                assert torch.equal(x, total)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_broadcast_and_reduce_from_and_to_every_rank(n):
    def check():
        comms = communicators().values()
        for root in range(n):
            for numel in (0, 1, 101, 6007, SLOT_BYTES // 8 + 1):
                expected, total = values(numel, torch.float64), values(numel, torch.float64)
                dist.broadcast(expected, root)
                dist.reduce(total, root, dist.ReduceOp.MAX)
                for comm in comms:
                    for plan in rooted_plans("broadcast", n, root):
                        x = values(numel, torch.float64)
                        assert comm.broadcast(x, root, plan) is None
                        assert torch.equal(x, expected), (comm.transport, root, numel, plan)
                    for plan in rooted_plans("reduce", n, root):
                        x = values(numel, torch.float64)
                        assert comm.reduce(x, root, "max", plan) is None
                        assert dist.get_rank() != root or torch.equal(x, total), (comm.transport, root, numel, plan)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_what_only_moves_may_have_any_dtype(n):
    def check():
        for dtype in (*CARRIED, torch.int16, torch.uint16, torch.float8_e4m3fn):
            for comm in communicators().values():
                x, theirs = values(103, dtype), values(103, dtype, rank=n - 1)
                comm.broadcast(x, n - 1)
                assert torch.equal(x.view(torch.uint8), theirs.view(torch.uint8)), (comm.transport, dtype)

    run(check, n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_all_to_all(n):
    """Sizes differ for every pair, some are 0; gloo's all_to_all_single has split sizes for that."""

    def check():
        rank = dist.get_rank()
        for comm in communicators().values():
            for dtype, scale in ((torch.float32, 3), (torch.int8, SLOT_BYTES // 3), (torch.bool, 2000)):
                sizes = [[scale * ((2 * src + dst) % 3) + (src == 2) for dst in range(n)] for src in range(n)]
                sent, received = sizes[rank], [sizes[src][rank] for src in range(n)]
                mine, expected = values(sum(sent), dtype), torch.empty(sum(received), dtype=dtype)
                dist.all_to_all_single(expected, mine, received, sent)
                outputs = [torch.empty(size, dtype=dtype) for size in received]
                assert comm.all_to_all(outputs, list(mine.split(sent))) is None
                assert torch.equal(torch.cat(outputs), expected), (comm.transport, dtype)

    run(check, n)
