"""What a call takes and counts, what runs in the background, and what is refused before anything is sent."""

import re
import time

import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.replication import plans
from minilib.ranks.collectives import Communicator, Pending, chunk_of
from minilib.ranks.launch import run
from minilib.ranks.transport.base import CollectiveFailed
from tests.ranks.collective_cases import TRANSPORTS, all_reduce_plans, communicators, over_both, rooted_plans, values

# Tensors

CUTS = {
    "transposed": lambda x: x.view(40, 30).t(),
    "every third": lambda x: x[::3],
    "channels last": lambda x: x.view(2, 3, 20, 10).contiguous(memory_format=torch.channels_last),
    "of no dimension": lambda x: x[100],
    "of many dimensions": lambda x: x.view(2, 1, 3, 1, 1, 4, 1, 5, 10),
}


@pytest.mark.parametrize("n", [1, 3])
def test_tensors_of_any_shape_and_strides(n):
    def check(comm):
        for name, cut in CUTS.items():
            whole, gaps = values(1200), torch.ones(1200, dtype=torch.bool)
            before, x = whole.clone(), cut(whole)
            cut(gaps).fill_(False)
            expected = x.contiguous()
            dist.all_reduce(expected)
            comm.all_reduce(x)
            assert torch.equal(x, expected), name
            assert torch.equal(whole[gaps], before[gaps]), name
            comm.broadcast(x.zero_().add_(dist.get_rank()), n - 1)
            assert torch.equal(x, torch.full_like(x, n - 1)), name

    run(over_both, n, check)


def test_tensors_with_gradients():
    def check(comm):
        leaf = values(101).requires_grad_()
        comm.all_reduce(leaf)
        assert leaf.requires_grad and leaf.is_leaf
        assert torch.equal(leaf, values(101, rank=0) + values(101, rank=1))
        (3 * leaf).sum().backward()
        assert torch.equal(leaf.grad, torch.full((101,), 3.0))
        assert not comm.reduce_scatter(leaf).requires_grad
        comm.all_gather(leaf)
        comm.broadcast(2 * leaf)
        outputs = [torch.empty(5), torch.empty(5)]
        comm.all_to_all(outputs, [(leaf * 2)[:5], leaf[5:10]])
        assert not outputs[0].requires_grad

    run(over_both, 2, check)


# Traffic


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_messages_and_bytes_are_those_of_the_plan(n):
    def check(comm):
        rank = dist.get_rank()

        def sent(plan, call, x, /, *args, **options) -> tuple[int, int]:
            sizes = [len(part) * x.element_size() for part in x.tensor_split(plan.num_chunks)]
            messages, nbytes = comm.traffic.messages, comm.traffic.bytes
            call(x, *args, **options)
            counted = comm.traffic.messages - messages, comm.traffic.bytes - nbytes
            assert counted == (plan.messages(rank), plan.bytes_sent(rank, sizes)), plan
            return counted

        for numel in (12, 101):
            x = values(numel, torch.float64)
            for plan in filter(None, all_reduce_plans(n)):
                sent(plan, comm.all_reduce, x, plan=plan)
            for root in range(n):
                for plan in filter(None, rooted_plans("broadcast", n, root)):
                    sent(plan, comm.broadcast, x, root, plan)
                for plan in filter(None, rooted_plans("reduce", n, root)):
                    sent(plan, comm.reduce, x, root, "sum", plan)
        x = values(12 * 50_000, torch.float64)
        share = (n - 1) * 8 * len(x) // n
        assert sent(plans.ring("all_reduce", n), comm.all_reduce, x) == (2 * (n - 1), 2 * share)
        assert sent(plans.ring("reduce_scatter", n), comm.reduce_scatter, x) == (n - 1, share)
        assert sent(plans.ring("all_gather", n), comm.all_gather, x) == (n - 1, share)

    run(over_both, n, check)


def test_nothing_is_sent_of_nothing():
    def check(comm):
        comm.all_reduce(torch.empty(0))
        peer = 1 - dist.get_rank()
        comm.all_to_all([torch.empty(7 - 7 * peer) for _ in "01"], [torch.empty(0), torch.empty(7)])
        assert (comm.traffic.messages, comm.traffic.bytes) == (peer, 28 * peer)  # rank 0 sends 7 values
        comm.all_reduce(torch.ones(1))
        assert (comm.traffic.messages, comm.traffic.bytes) == (1 + peer, 4 + 28 * peer)

    run(over_both, 2, check)


# In the background


@pytest.mark.parametrize("n", [1, 2, 3])
def test_calls_in_the_background_come_in_order(n):
    def check(comm):
        rank = dist.get_rank()
        xs = [values(10 ** (k % 4) + k) for k in range(8)]
        expected = [x * 1 for x in xs]
        for x in expected:
            dist.all_reduce(x)
        pending = [comm.all_reduce(x, async_op=True) for x in xs[:3]]
        comm.all_reduce(xs[3])  # not before those three
        assert all(each.done for each in pending)
        pending += [comm.all_reduce(x, async_op=True) for x in xs[4:6]]
        pending.append(comm.reduce_scatter(xs[6], async_op=True))
        pending.append(comm.all_gather(xs[6], async_op=True))
        pending.append(comm.reduce(xs[7], n - 1, async_op=True))
        pending.append(comm.broadcast(xs[7], n - 1, async_op=True))
        ones = torch.ones(n) * rank
        outputs = list(torch.empty(n).split(1))
        pending.append(comm.all_to_all(outputs, list(ones.split(1)), async_op=True))
        assert all(isinstance(each, Pending) for each in pending)
        for each in reversed(pending):
            assert each.wait() is None
            assert each.wait() is None and each.done
        assert all(torch.equal(x, y) for x, y in zip(xs, expected, strict=True))
        assert torch.cat(outputs).tolist() == list(range(n))

    run(over_both, n, check)


def test_a_call_in_the_background_returns_before_the_others_come():
    def check(comm):
        x = values(1000)
        if dist.get_rank() == 0:
            dist.barrier()  # rank 1 is past its call
        pending = comm.all_reduce(x, async_op=True)
        if dist.get_rank() == 1:
            assert not pending.done
            dist.barrier()
        pending.wait()
        assert torch.equal(x, values(1000, rank=0) + values(1000, rank=1))
        comm.all_reduce(x, async_op=True)
        comm.close()  # finishes it
        assert torch.equal(x, 2 * (values(1000, rank=0) + values(1000, rank=1)))

    run(over_both, 2, check)


# Groups


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_nobody_passes_a_barrier_that_somebody_has_not_reached(n, tmp_path):
    def check():
        for name, comm in communicators().items():
            for turn in range(3):
                time.sleep(0.02 * ((dist.get_rank() + turn) % n))
                (tmp_path / f"{name}-{turn}-{dist.get_rank()}").touch()
                comm.barrier()
                assert len(list(tmp_path.glob(f"{name}-{turn}-*"))) == n

    run(check, n)


def test_two_groups_of_two():
    """A rank's number, a root's too, is its place in the group."""

    def check():
        groups = [dist.new_group(members) for members in ([0, 2], [1, 3])]
        rank = dist.get_rank()
        for kind in TRANSPORTS.values():
            comm = Communicator(kind(groups[rank % 2]))
            assert (comm.rank, comm.world_size) == (rank // 2, 2)
            x = values(3000)
            comm.all_reduce(x)
            assert torch.equal(x, values(3000, rank=rank % 2) + values(3000, rank=rank % 2 + 2))
            x = values(3000)
            comm.broadcast(x, src=1)
            assert torch.equal(x, values(3000, rank=rank % 2 + 2))
            comm.close()
            dist.all_reduce(torch.ones(1), group=groups[rank % 2])  # is the caller's, and still there

    run(check, 4)


# Refusals


def refused(call, says: str, kind: type[Exception] = ValueError) -> None:
    try:
        call()
    except kind as error:
        assert re.search(says, str(error)), error
    else:
        raise AssertionError(f"not refused, though {says}")


def test_wrong_arguments_are_refused_before_anything_is_sent():
    def check(comm):
        x, ints, ring = torch.ones(6), torch.ones(6, dtype=torch.int64), plans.ring("all_reduce", 2)
        reduce = comm.all_reduce
        refused(lambda: reduce(x, "mean"), "one of sum, avg, .*; got 'mean'")
        refused(lambda: reduce(ints, "avg"), "average of torch.int64.*op='sum' and divide")
        refused(lambda: reduce(x, "band"), "'band' does not apply to torch.float32")
        refused(lambda: reduce(x.cfloat(), "max"), "'max' does not apply to torch.complex64")
        refused(lambda: reduce(x, plan=plans.ring("all_reduce", 3)), "of 2 ranks.*plan for all_reduce of 3")
        refused(lambda: reduce(x, plan=plans.star("broadcast", 2)), "all_reduce of 2.*plan for broadcast of 2")
        refused(lambda: reduce(x.to_sparse()), "dense tensors, got torch.sparse_coo")
        refused(lambda: reduce(torch.ones(2, device="meta")), "CPU tensors, got one on meta")
        refused(lambda: reduce(torch.ones(1).expand(6)), r"expanded one, of strides \(0,\)")
        refused(lambda: reduce(x.cfloat().conj()), "resolve_conj")
        refused(lambda: comm.broadcast(x, 2), r"no rank 2; ranks are 0 … 1")
        refused(lambda: comm.reduce(x, -1), "no rank -1")
        refused(lambda: comm.broadcast(x, 1, plans.tree("broadcast", 2)), "of rank 1 .* plan of rank 0")
        refused(lambda: comm.broadcast(x, 0, ring), "broadcast of 2 ranks .* plan for all_reduce")
        refused(lambda: comm.reduce_scatter(x.view(2, 3).t()), r"strides \(1, 3\); call .contiguous")
        refused(lambda: comm.all_to_all([x], [x, x]), "2 inputs and outputs, got 2 and 1")
        refused(lambda: comm.all_to_all([x[::2], x], [x, x]), r"strides \(2,\)")
        refused(lambda: comm.all_to_all([x, ints], [x, x]), "one dtype, got torch.float32, torch.int64")
        refused(lambda: comm.all_to_all([x[1:], x[1:]], [x, x]), "sends itself 6 values, and expects 5")
        assert comm.traffic.messages == 0
        y = values(6)
        comm.all_reduce(y)  # as good as new
        assert torch.equal(y, values(6, rank=0) + values(6, rank=1))
        refused(lambda: chunk_of(x.view(2, 3).t(), 0, 2), "contiguous")

    run(over_both, 2, check)


def test_a_closed_communicator_says_so():
    def check(comm):
        comm.all_reduce(values(5))
        comm.close()
        comm.close()
        refused(lambda: comm.all_reduce(values(5)), "is closed", CollectiveFailed)
        refused(lambda: comm.all_reduce(values(5), async_op=True), "is closed", CollectiveFailed)

    run(over_both, 2, check)
