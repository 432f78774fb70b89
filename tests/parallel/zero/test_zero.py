"""ZeRO's stages against one process on the whole batch, and against each other."""

import copy
import math
from functools import partial

import pytest
import torch

from minilib.parallel.zero.ledger import STAGES
from minilib.ranks import launch
from tests.parallel.zero.models import (
    ADAMW,
    Odd,
    batch,
    communicator,
    groups,
    largest_difference,
    loss_of,
    odd_zero,
    train,
    train_alone,
    values,
)

CLIP = 0.1  # most gradients here are longer


@pytest.mark.parametrize(("world_size", "transport"), [(1, "group"), (2, "shared"), (3, "group"), (4, "shared")])
def test_all_stages_are_one_process_on_the_whole_batch(world_size, transport):
    """Odd sizes, tied, frozen and unused parameters, two groups, accumulation, clipping; 20 AdamW steps in float64."""

    def on_rank():
        comm = communicator(transport)
        return [_trained(odd_zero(comm, stage)) for stage in STAGES]

    def _trained(zero):
        norms = [norm for _, norm in train(zero, range(20), clip=CLIP, micro=2)]
        return zero.full_state_dict(), norms

    model = Odd(0).double()
    norms = train_alone(model, range(20), clip=CLIP, micro=2)
    assert max(norms) > 2 * CLIP, "nothing was clipped"
    ranks = launch.run(on_rank, world_size)
    first, _ = ranks[0][0]
    for rank, stages in enumerate(ranks):
        for state, seen in stages:
            assert state.pop("seen") == rank, "a buffer was touched"
            assert state.keys() == model.state_dict().keys() - {"seen"}
            assert all(torch.equal(state[name], first[name]) for name in state), "not the same bits in all stages"
            assert largest_difference({name: state[name] for name in values(model)}, values(model)) < 1e-10
            assert seen == pytest.approx(norms, abs=1e-12)


def test_gradients_add_up_over_backwards_with_and_without_no_sync():
    """Averages of several backwards are the average of their sum, also after a reduction in stages 0 and 1."""

    def on_rank():
        comm = communicator("shared")
        sums = []
        for stage in STAGES:
            for local in ((True, True, False), (False, False, False), (False, True, False)):
                zero = odd_zero(comm, stage, seed=0)
                rank = comm.rank
                for part, kept in enumerate(local):
                    tokens = torch.arange(4) + rank + part
                    if kept:
                        with zero.no_sync():
                            loss_of(zero.model, tokens, tokens).backward()
                    else:
                        loss_of(zero.model, tokens, tokens).backward()
                sums.append(zero.grad_norm())
        return sums

    for sums in launch.run(on_rank, 3):
        assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-12)


@pytest.mark.parametrize("optimizer", [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    partial(torch.optim.AdamW, lr=1e-2, fused=True),
    partial(torch.optim.AdamW, lr=1e-2, foreach=True, amsgrad=True),
    partial(torch.optim.RMSprop, lr=1e-2),
], ids=["sgd", "fused", "foreach", "rmsprop"])  # fmt: skip
def test_any_elementwise_optimizer(optimizer):
    def on_rank():
        comm = communicator("shared")
        states = []
        for stage in (1, 3):
            zero = odd_zero(comm, stage, optimizer=optimizer)
            train(zero, range(3))
            states.append(zero.full_state_dict())
        return states

    model = Odd(0).double()
    train_alone(model, range(3), optimizer=optimizer)
    for state in launch.run(on_rank, 2)[1]:
        state = {name: value for name, value in state.items() if name in values(model)}
        assert largest_difference(state, values(model)) < 1e-10


def test_a_learning_rate_schedule_reaches_every_slice():
    def on_rank():
        zero = odd_zero(communicator("group"), 3, optimizer=partial(torch.optim.SGD, lr=0.0))
        before = zero.full_state_dict()
        for group in zero.optimizer.param_groups:
            group["lr"] = 0.0
        train(zero, range(2))
        return largest_difference(before, zero.full_state_dict())

    assert launch.run(on_rank, 2) == [0, 0]


# Mixed precision


def reference_with_masters(model, steps, optimizer):
    """One process: forward and backward in bfloat16, the optimizer on a float32 copy."""
    masters = copy.deepcopy(model)
    optimizer = optimizer(groups(masters))
    low = model.bfloat16()
    for step in steps:
        for parameter, master in zip(low.parameters(), masters.parameters(), strict=True):
            parameter.data.copy_(master)
            parameter.grad = None
        loss_of(low, *batch(100 * step)).backward()
        for parameter, master in zip(low.parameters(), masters.parameters(), strict=True):
            if master.requires_grad:
                master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
        optimizer.step()
    return values(masters)


def distance(one, other):
    return math.sqrt(sum((one[name] - other[name]).square().sum().item() for name in one))


@pytest.mark.parametrize("optimizer", [ADAMW, partial(torch.optim.SGD, lr=1e-4)], ids=["adamw", "tiny-steps"])
def test_bf16_updates_fp32_masters(optimizer):
    """Rounding aside the path is that of one process. Steps too small for bfloat16 weights add up all the same."""

    def on_rank():
        comm = communicator("shared")
        found = []
        for stage in STAGES:
            zero = odd_zero(comm, stage, precision="bf16", optimizer=optimizer)
            assert {p.dtype for p in zero.model.parameters()} == {torch.bfloat16}
            train(zero, range(20))
            found.append(zero.full_state_dict())
        return found

    expected = reference_with_masters(Odd(0), range(20), optimizer)
    moved = distance(expected, values(Odd(0)))
    for stages in launch.run(on_rank, 3):
        for state in stages:
            assert {x.dtype for name, x in state.items() if name != "seen"} == {torch.float32}
            state = {name: state[name] for name in expected}
            assert all(torch.equal(state[name], stages[0][name]) for name in state), "not the same bits in all stages"
            assert distance(state, expected) < 0.03 * moved


def test_a_norm_that_is_no_number_spoils_every_rank_s_part():
    """As torch's: no rank may take its part of a step that another cannot take."""

    def on_rank():
        comm = communicator("shared")
        zero = odd_zero(comm, 2)
        loss_of(zero.model, *batch(0, comm.rank, comm.world_size)).backward()
        zero.grad_norm()  # averages
        if comm.rank == 0:
            next(each.own for each in zero.gradients.values() if each.own.numel())[0] = math.nan
        norm = zero.clip_grad_norm(CLIP)
        return norm, all(each.own.isnan().all().item() for each in zero.gradients.values())

    found = launch.run(on_rank, 2)
    assert all(math.isnan(norm) for norm, _ in found)
    assert [spoilt for _, spoilt in found] == [True, True]
