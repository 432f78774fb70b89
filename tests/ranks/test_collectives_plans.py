"""What a plan simulates, it also does: random valid plans, with strides, run on ranks of both transports."""

import random

import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.replication import Plan, Transfer, pack_rounds, simulate
from minilib.ranks.launch import run
from tests.ranks.collective_cases import communicators, values

PLANS = 25


def random_plans(n: int, seed: int) -> list[Plan]:
    """A broadcast, the reduction that is its reverse, and both one after the other; every chunk is received once."""
    draw = random.Random(seed)
    num_chunks, root = draw.randint(1, 9), draw.randrange(n)
    holds = [set(range(num_chunks)) if rank == root else set() for rank in range(n)]
    down: list[Transfer] = []
    while any(len(held) < num_chunks for held in holds):
        src, dst = draw.sample(range(n), 2)
        chunk, stride = draw.randrange(num_chunks), draw.randint(1, 4)
        count = draw.randint(1, (num_chunks - 1 - chunk) // stride + 1)
        transfer = Transfer(src, dst, chunk, count=count, stride=stride)
        if holds[src].issuperset(transfer.chunks) and holds[dst].isdisjoint(transfer.chunks):
            holds[dst].update(transfer.chunks)
            down.append(transfer)
    up = [Transfer(t.dst, t.src, t.chunk, True, t.count, t.stride) for t in reversed(down)]
    parts = {"broadcast": down, "reduce": up, "all_reduce": up + down}
    return [Plan("random", name, n, num_chunks, pack_rounds(part), root) for name, part in parts.items()]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_running_is_what_simulating_says(n):
    plans = [plan for seed in range(PLANS) for plan in random_plans(n, 1000 * n + seed)]
    strided = [plan for plan in plans if any(t.stride > 1 and t.count > 1 for group in plan.rounds for t in group)]
    assert len(strided) > PLANS
    for plan in plans:
        simulate(plan)  # raises where a plan breaks its promise

    def check():
        rank = dist.get_rank()
        for name, comm in communicators().items():
            for plan in plans:
                for numel in (plan.num_chunks - 1, plan.num_chunks, 101):  # also chunks of nothing, and uneven ones
                    x, expected = values(numel), values(numel)
                    if plan.collective == "broadcast":
                        dist.broadcast(expected, plan.root)
                        comm.broadcast(x, plan.root, plan)
                    elif plan.collective == "reduce":
                        dist.all_reduce(expected)
                        comm.reduce(x, plan.root, plan=plan)
                    else:
                        dist.all_reduce(expected)
                        comm.all_reduce(x, plan=plan)
                    if plan.collective != "reduce" or rank == plan.root:
                        assert torch.equal(x, expected), (name, numel, plan, plan.rounds)

    run(check, n)


def test_the_smallest_strided_all_reduce():
    """Two ranks, four chunks, every second one in a message."""
    up = [Transfer(1, 0, 0, True, count=2, stride=2), Transfer(1, 0, 1, True, count=2, stride=2)]
    down = [Transfer(0, 1, 0, count=2, stride=2), Transfer(0, 1, 1, count=2, stride=2)]
    plan = Plan("strided", "all_reduce", 2, 4, pack_rounds(up + down))

    def check():
        found = []
        for comm in communicators().values():
            x = torch.arange(8.0) + 1 + 10 * dist.get_rank()
            comm.all_reduce(x, plan=plan)
            found.append(x.tolist())
        return found

    expected = [2.0 * value + 12 for value in range(8)]
    assert run(check, 2) == [[expected, expected]] * 2
