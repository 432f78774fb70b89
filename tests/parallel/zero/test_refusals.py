"""How a model is divided, and what is refused, with what words."""

import pytest
import torch
from torch import nn

from minilib.parallel.zero import StepWithoutBackward, Zero
from minilib.parallel.zero.gradients import LateGradient
from minilib.parallel.zero.layout import (
    FROZEN,
    OUTER,
    UnsuitableModel,
    check_parameters,
    group_of,
    layouts_of,
    units_of,
)
from minilib.ranks import launch
from minilib.ranks.agreement import RanksDiffer
from tests.parallel.zero.models import Block, Odd, communicator, decoder, groups, loss_of, odd_zero


def names(model, blocks=None):
    return {unit.name: list(unit.parameters) for unit in units_of(model, blocks)}


# Units and rows


def test_the_decoders_units_are_its_layers_and_the_rest():
    found = names(decoder())
    assert list(found) == [OUTER, "layers.0", "layers.1", "layers.2"]
    assert found[OUTER] == ["embed.weight", "norm.weight"]
    assert found["layers.1"] == [f"layers.1.{name}" for name, _ in decoder().layers[1].named_parameters()]


def test_every_parameter_is_in_one_unit():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared), nn.ReLU(), Block(), shared)
    assert names(model) == {
        OUTER: ["0.0.weight", "0.0.bias"],
        "2": ["2.gain", "2.up.weight", "2.up.bias", "2.down.weight"],
    }, "what two blocks share is in neither"
    twice = nn.ModuleList([(block := Block()), nn.Linear(2, 2), block])
    assert list(names(twice)) == [OUTER, "0", "1"], "a block that is used twice is one"
    assert names(nn.Linear(2, 2)) == {OUTER: ["weight", "bias"]}
    assert list(names(decoder(), blocks=[decoder().norm] * 0)) == [OUTER]


def test_a_row_has_its_groups_together_and_the_frozen_apart():
    model = Odd()
    number = group_of(model, groups(model))
    rows = [layout for unit in units_of(model) for layout, _ in layouts_of(unit, number, 4)]
    assert [row.name for row in rows] == [
        "outer", "blocks.0", "blocks.1", "blocks.1 (frozen)", "blocks.2 (frozen)", "blocks.3",
    ]  # fmt: skip
    assert rows[3].groups == (FROZEN,)
    first = rows[1]
    assert [name.removeprefix("blocks.0.") for name in first.names] == [
        "up.weight", "down.weight", "gain", "spare", "up.bias",
    ]  # fmt: skip
    assert (first.groups, first.spans[-1], first.length) == ((0, 0, 1, 1, 1), (74, 81), 84)


# Refusals before any rank is needed


@pytest.mark.parametrize(("options", "words"), [
    ({"stage": 4}, r"stage is 0 \(nothing is cut\).* got 4"),
    ({"stage": "3"}, "got '3'"),
    ({"precision": "fp8"}, "precision is one of fp32, bf16, fp64; got 'fp8'"),
])  # fmt: skip
def test_unknown_options(options, words):
    with pytest.raises(ValueError, match=words):
        Zero(Odd(), None, **options)


@pytest.mark.parametrize(("model", "words"), [
    (nn.Linear(2, 2, device="meta"), "weight is torch.float32, torch.strided, on meta; .* takes dense torch.float32"),
    (Odd().bfloat16(), r"embed.weight is torch.bfloat16.* convert it with model.to\('cpu', torch.float32\)"),
])  # fmt: skip
def test_parameters_that_do_not_fit(model, words):
    with pytest.raises(UnsuitableModel, match=words):
        check_parameters(model, torch.float32, torch.device("cpu"))


def test_groups_and_blocks_that_do_not_fit():
    model = Odd()
    with pytest.raises(UnsuitableModel, match="norm.weight is in no group of param_groups"):
        group_of(model, [{"params": [p for name, p in model.named_parameters() if name != "norm.weight"]}])
    with pytest.raises(UnsuitableModel, match="embed.weight is in two groups"):
        group_of(model, [{"params": model.parameters()}, {"params": [model.embed.weight]}])
    with pytest.raises(UnsuitableModel, match="no parameter to train"):
        group_of(model.requires_grad_(False), [])
    with pytest.raises(UnsuitableModel, match="a block is a module within the model; Linear is not"):
        units_of(model, [nn.Linear(1, 1)])
    with pytest.raises(UnsuitableModel, match="Odd is not"):
        units_of(model, [model])
    with pytest.raises(UnsuitableModel, match=r"block blocks.1.up lies within block blocks.1"):
        units_of(model, [model.blocks[1], model.blocks[1].up])


# Refusals among ranks


def test_ranks_that_build_other_models():
    def on_rank():
        comm = communicator("group")
        with pytest.raises(RanksDiffer, match="weight: rank 0 has .* rank 1 has"):
            Zero(nn.Linear(2, 2 + comm.rank), comm)

    launch.run(on_rank, 2)


def test_steps_need_averaged_gradients():
    def on_rank():
        zero = odd_zero(communicator("group"), 3)
        tokens = torch.arange(4)
        for act in (zero.step, zero.grad_norm):
            with pytest.raises(StepWithoutBackward, match=r"call loss.backward\(\)"):
                act()
        with zero.no_sync():
            loss_of(zero.model, tokens, tokens).backward()
        with pytest.raises(StepWithoutBackward, match=r"call loss.backward\(\)|within no_sync\(\)"):
            zero.step()
        loss_of(zero.model, tokens, tokens).backward()
        zero.step()
        with zero.no_sync():
            loss_of(zero.model, tokens, tokens).backward()
        with pytest.raises(StepWithoutBackward, match=r"within no_sync\(\).*leave the last of several outside"):
            zero.step()
        zero.zero_grad()
        with pytest.raises(StepWithoutBackward):
            zero.step()
        zero.check_invariants()

    launch.run(on_rank, 2)


class Sneaky(nn.Module):
    """Uses a block's weight in the outer forward, before the block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        x = x * self.blocks[2].bias
        for block in self.blocks:
            x = block(x)
        return x


def test_a_block_is_used_by_its_own_forward_only():
    def on_rank():
        comm = communicator("group")
        zero = Zero(Sneaky(), comm, 2)
        zero.model(torch.ones(3)).sum().backward()  # nothing is gathered, and reductions wait for all gradients
        zero.step()
        with pytest.raises(RuntimeError, match="size"):
            Zero(Sneaky(), comm, 3).model(torch.ones(3))

    launch.run(on_rank, 1)


def test_a_gradient_after_those_of_its_unit_were_sent():
    def on_rank():
        zero = odd_zero(communicator("group"), 3)
        tokens = torch.arange(4)
        loss = loss_of(zero.model, tokens, tokens)
        early = zero.gradients["blocks.3"]
        early.row.parameters[0].register_hook(lambda grad: early.reduce())
        with pytest.raises(LateGradient, match="blocks.3.up.weight got a gradient after those of unit 'blocks.3' were"):
            loss.backward()

    launch.run(on_rank, 1)


def test_sparse_gradients_are_refused():
    def on_rank():
        sparse = Zero(nn.Embedding(4, 2, sparse=True), communicator("group"), 1)
        with pytest.raises(UnsuitableModel, match="weight has a gradient of layout torch.sparse_coo"):
            sparse.model(torch.tensor([1])).sum().backward()

    launch.run(on_rank, 1)
