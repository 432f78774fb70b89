"""When ranks gather and reduce: the plan, the walk, and forwards and backwards that do not follow it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilib.parallel.zero import Zero
from minilib.parallel.zero.plan import Op, Walk, backward_plan, forward_plan
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import CollectiveFailed
from tests.parallel.zero.models import TRANSPORTS, Block, communicator, largest_difference, values

SGD = partial(torch.optim.SGD, lr=0.1)


def text(plan):
    return " ".join(map(str, plan))


def test_plans():
    assert text(forward_plan(4)) == "G0 G1 G2 G3"
    assert text(backward_plan(4, True, range(4))) == "G0 G3 G2 R3 G1 R2 R1 R0"
    assert text(backward_plan(4, True, ())) == "G0 G3 G2 G1"
    assert text(backward_plan(4, False, (0, 1, 3))) == "R3 R1 R0"
    assert text(backward_plan(2, True, (0, 1))) == "G0 G1 R1 R0"
    assert text(backward_plan(1, True, (0,))) == "G0 R0"


def test_who_comes_to_an_operation_does_those_before_it():
    done = []
    walk = Walk(forward_plan(4), done.append)
    walk.through(Op("gather", 1))
    walk.through(Op("gather", 0))
    walk.through(Op("reduce", 3))
    assert text(done) == "G0 G1" and walk.next == Op("gather", 2)
    walk.through(Op("gather", 2))
    walk.finish()
    assert text(done) == "G0 G1 G2 G3" and walk.next is None


# What happens when


class Recorded(Communicator):
    """Writes down collectives as they begin."""

    def __init__(self, transport):
        super().__init__(transport)
        self.log = []

    def all_gather(self, tensor, async_op=False):
        self.log.append(f"gather {tensor.numel()}")
        return super().all_gather(tensor, async_op)

    def reduce_scatter(self, tensor, op="sum", async_op=False):
        self.log.append(f"reduce {tensor.numel()}")
        return super().reduce_scatter(tensor, op, async_op)


class Chain(nn.Module):
    """Blocks of 2, 4 and 6 parameters between an outer scale of 8; `order` says which the forward uses."""

    def __init__(self, order=(0, 1, 2), seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.order = order
        self.scale = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))
        self.blocks = nn.ModuleList(_Factor(size, generator) for size in (2, 4, 6))

    def forward(self, x):
        x = x * self.scale.sum()
        for index in self.order:
            x = torch.tanh(self.blocks[index](x))
        return x * self.scale.mean()


class _Factor(nn.Module):
    def __init__(self, size, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
        self.log, self.without_gradient = [], False

    def forward(self, x):
        self.log.append(f"forward {self.weight.numel()}")
        product = x * (self.weight.detach() if self.without_gradient else self.weight).sum()
        if product.requires_grad:
            product.register_hook(lambda grad: self.log.append(f"backward {self.weight.numel()}"))
        return product + 1


IN_ORDER = [
    "gather 8", "gather 2", "gather 4", "forward 2", "gather 6", "forward 4", "forward 6",
    "gather 4", "backward 6", "reduce 6", "gather 2", "backward 4", "reduce 4", "backward 2", "reduce 2", "reduce 8",
]  # fmt: skip
ON_DEMAND = [
    "gather 8", "gather 2", "gather 4", "gather 6", "forward 6", "gather 2", "forward 2", "forward 4",
    "gather 4", "backward 4", "gather 2", "backward 2", "gather 6", "backward 6",
    "reduce 6", "reduce 4", "reduce 2", "reduce 8",
]  # fmt: skip


def test_gathers_run_ahead_and_reductions_start_during_backward():
    """Unless blocks are used in another order; and the next step may be in order again."""

    def on_rank():
        comm = Recorded(TRANSPORTS["shared"]())
        zero = Zero(Chain(), comm, 3, SGD, precision="fp64")
        logs = []
        for order in ((0, 1, 2), (2, 0, 1), (0, 1, 2)):
            zero.model.order = order
            for block in zero.model.blocks:
                block.log = comm.log
            comm.log.clear()
            zero.model(torch.ones(1, dtype=torch.float64)).sum().backward()
            logs.append(comm.log.copy())
            zero.step()
            zero.zero_grad()
        return logs

    assert launch.run(on_rank, 2) == [[IN_ORDER, ON_DEMAND, IN_ORDER]] * 2


def test_reductions_start_during_backward_in_other_stages():
    def on_rank():
        comm = Recorded(TRANSPORTS["shared"]())
        zero = Zero(Chain(), comm, 2, SGD, precision="fp64")
        for block in zero.model.blocks:
            block.log = comm.log
        loss = zero.model(torch.ones(1, dtype=torch.float64)).sum()
        comm.log.clear()
        loss.backward()
        return comm.log

    expected = ["backward 6", "reduce 6", "backward 4", "reduce 4", "backward 2", "reduce 2", "reduce 8"]
    assert launch.run(on_rank, 2) == [expected] * 2


def test_no_more_than_two_blocks_are_here_at_a_time():
    """Their parameters, and in buckets their gradients."""

    def on_rank():
        model = nn.Sequential(*(Block() for _ in range(6)))
        zero = Zero(model, communicator("group"), 3, SGD)
        block = zero.rows[0].layout.length * 4
        seen = []

        def look(*_):
            held = zero.bytes_per_rank()
            seen.append((held["gathered"] / block, held["buckets"] / block))

        def look_now_and_in_backward(module, inputs, output):
            look()
            if output.requires_grad:
                output.register_hook(look)

        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(look_now_and_in_backward)
        for _ in range(2):
            output = model(torch.ones(1, 5))
            look()
            output.sum().backward()
            look()
            zero.step()
        with torch.no_grad():
            model(torch.ones(1, 5))
        look()
        return seen

    for seen in launch.run(on_rank, 2):
        gathered, buckets = zip(*seen, strict=True)
        assert set(buckets) == {2}
        assert set(gathered) == {0, 1, 2} and max(gathered) == 2
        assert [gathered[i] for i in (12, 25, 38, 51, -1)] == [1, 0, 1, 0, 0]  # after forwards and backwards


# Forwards and backwards of other kinds, each against the same on one process


def once(model, inputs):
    model(inputs).square().sum().backward()


def with_an_evaluation_between(model, inputs):
    loss = model(inputs).square().sum()
    with torch.inference_mode():
        model(inputs)
    loss.backward()


def with_a_forward_that_leads_nowhere(model, inputs):
    model(inputs)
    model(inputs).square().sum().backward()


def two_forwards_one_backward(model, inputs):
    (model(inputs) * model(inputs + 1)).sum().backward()


def two_forwards_two_backwards(model, inputs):
    first, second = model(inputs).sum(), model(inputs + 1).sum()
    first.backward()
    second.backward()


def two_backwards_of_one_forward(model, inputs):
    loss = model(inputs).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def checkpointed_as_a_whole(model, inputs):
    checkpoint(model, inputs, use_reentrant=False).square().sum().backward()


def after_a_failed_forward(model, inputs):
    with pytest.raises(TypeError):
        model("no tensor")
    model(inputs).square().sum().backward()


WAYS = [
    (once, (0, 1, 2)),
    (once, (2, 0, 1)),
    (once, (0, 1, 0, 2, 2)),
    (once, (1,)),
    (with_an_evaluation_between, (0, 1, 2)),
    (with_a_forward_that_leads_nowhere, (0, 1, 2)),
    (two_forwards_one_backward, (0, 1, 2)),
    (two_forwards_two_backwards, (0, 1, 2)),
    (two_backwards_of_one_forward, (0, 1, 2)),
    (checkpointed_as_a_whole, (0, 1, 2)),
    (after_a_failed_forward, (0, 1, 2)),
]


class Checkpointed(Chain):
    """Keeps no activations of its blocks, first of two together and then of one."""

    def forward(self, x):
        x = x * self.scale.sum()
        x = checkpoint(lambda x: torch.tanh(self.blocks[1](self.blocks[0](x))), x, use_reentrant=False)
        x = torch.tanh(checkpoint(self.blocks[2], x, use_reentrant=False))
        return x * self.scale.mean()


def reference(model, way, inputs, steps):
    """One process that averages what every rank's inputs give."""
    optimizer = SGD(model.parameters())
    for _ in range(steps):
        for mine in inputs:
            way(model, mine)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(inputs)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.parametrize("transport", ["group", "shared"])
def test_every_way_to_use_a_model(transport):
    inputs = [torch.linspace(-1, 1, 3, dtype=torch.float64) * (rank + 1) for rank in range(2)]
    cases = [(partial(Chain, order), way) for way, order in WAYS] + [(Checkpointed, once)]

    def on_rank():
        comm = communicator(transport)
        found = []
        for make, way in cases:
            for stage in (1, 3):
                zero = Zero(make(seed=comm.rank), comm, stage, SGD, precision="fp64")
                for _ in range(3):
                    way(zero.model, inputs[comm.rank])
                    zero.step()
                    zero.zero_grad()
                    zero.check_invariants()
                found.append(zero.full_state_dict())
        return found

    expected = [reference(make(), way, inputs, 3) for make, way in cases for _ in range(2)]
    for found in launch.run(on_rank, 2):
        for ours, theirs in zip(found, expected, strict=True):
            assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_may_use_other_blocks_than_others(stage):
    """Rank 0 uses blocks 0 and 2, rank 1 only 1, rank 2 none: nobody hangs, unused ones have gradients of zero."""
    orders = [(0, 2), (1,), ()]

    def on_rank():
        comm = communicator("shared")
        zero = Zero(Chain(orders[comm.rank]), comm, stage, SGD, precision="fp64")
        for step in range(3):
            zero.model(torch.tensor([0.3 + step + comm.rank], dtype=torch.float64)).sum().backward()
            zero.step()
            zero.zero_grad()
            zero.check_invariants()
        return zero.full_state_dict()

    model = Chain()
    optimizer = SGD(model.parameters())
    for step in range(3):
        for rank, model.order in enumerate(orders):
            (model(torch.tensor([0.3 + step + rank], dtype=torch.float64)).sum() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in launch.run(on_rank, 3):
        assert largest_difference(state, values(model)) < 1e-12


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1, 2)])
def test_a_parameter_may_get_no_gradient_on_one_rank(order):
    """Ranks then complete units in other orders, and must not start reductions so."""

    def on_rank():
        zero = Zero(Chain(order), communicator("shared"), 3, SGD, precision="fp64")
        zero.model.blocks[2].without_gradient = zero.comm.rank == 1
        for _ in range(2):
            zero.model(torch.ones(1, dtype=torch.float64)).sum().backward()
            zero.step()
            zero.zero_grad()
            zero.check_invariants()
        return zero.full_state_dict()

    model = Chain(order)
    optimizer = SGD(model.parameters())
    for _ in range(2):
        for model.blocks[2].without_gradient in (False, True):
            (model(torch.ones(1, dtype=torch.float64)).sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in launch.run(on_rank, 2):
        assert largest_difference(state, values(model)) < 1e-12


# When a rank fails


@pytest.mark.parametrize("transport", ["group", "shared"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_raises_takes_the_others_with_it(transport, where):
    def on_rank():
        comm = communicator(transport)
        zero = Zero(Chain(), comm, 3, SGD, precision="fp64")

        def fail(*_):
            raise ArithmeticError("rank 1 cannot go on")

        def fail_later(module, inputs, output):
            output.register_hook(fail)

        if comm.rank == 1:
            zero.model.blocks[1].register_forward_hook(fail if where == "forward" else fail_later)
        try:
            zero.model(torch.ones(1, dtype=torch.float64)).sum().backward()
            zero.step()
        except (ArithmeticError, CollectiveFailed) as error:
            comm.close()
            return type(error).__name__
        return "nothing happened"

    said = launch.run(on_rank, 3, timeout=30)
    assert said[1] == "ArithmeticError"
    assert {said[0], said[2]} == {"CollectiveFailed"}


def test_the_first_failure_is_reported():
    def on_rank():
        comm = communicator("shared")
        zero = Zero(Chain(), comm, 3, SGD, precision="fp64")
        x = torch.ones(1, dtype=torch.float64)
        zero.model("no tensor" if comm.rank == 1 else x).sum().backward()

    with pytest.raises(launch.RankFailed, match="rank 1 of 2 failed"):
        launch.run(on_rank, 2, timeout=30)


def test_after_a_failed_backward_a_single_rank_can_go_on():
    def on_rank():
        comm = communicator("group")
        norms = []
        for stage in (1, 3):
            zero = Zero(Chain(), comm, stage, SGD, precision="fp64")
            x = torch.ones(1, dtype=torch.float64)

            def fail(grad):
                raise ArithmeticError

            for broken in (False, True, False):
                output = zero.model(x)
                if broken:
                    handle = zero.model.blocks[1].weight.register_hook(fail)
                    with pytest.raises(ArithmeticError):
                        output.sum().backward()
                    handle.remove()
                else:
                    output.sum().backward()
                    norms.append(zero.grad_norm())
                zero.zero_grad()
        return norms

    [norms] = launch.run(on_rank, 1)
    assert len(norms) == 4 and set(norms) == {norms[0]}
