"""Calls on the model of stage 3 that would read, write or copy empty parameters: refused by name."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch

from minilib.parallel.zero import ParametersElsewhere
from minilib.parallel.zero.ledger import STAGES
from minilib.ranks import launch
from tests.parallel.zero.models import Odd, communicator, loss_of, odd_zero, train, values

TOKENS = torch.arange(4)


def refused(call):
    with pytest.raises(ParametersElsewhere) as error:
        call()
    return str(error.value)


def test_reading_writing_and_copying_are_refused_by_name():
    def on_rank():
        zero = odd_zero(communicator("group"), 3)
        model, state = zero.model, Odd(3).double().state_dict()
        said = {
            "state": refused(model.state_dict),
            "block": refused(model.blocks[1].state_dict),
            "load": refused(lambda: model.load_state_dict(state)),
            "load block": refused(lambda: model.blocks[1].load_state_dict(Odd(3).blocks[1].state_dict())),
            "assign": refused(lambda: model.load_state_dict(state, assign=True)),
            "deepcopy": refused(lambda: copy.deepcopy(model)),
            "block copy": refused(lambda: copy.copy(model.blocks[0])),
            "save": refused(lambda: torch.save(model, io.BytesIO())),
            "pickle": refused(lambda: pickle.dumps(model)),
        }
        assert int(model.seen) == zero.comm.rank, "half of a state was loaded"
        zero.check_invariants()
        train(zero, range(2))  # nothing was damaged
        return said

    for said in launch.run(on_rank, 2):
        assert said["state"].startswith("state_dict() would return embed.weight empty")
        assert "would return gain empty" in said["block"]
        assert all("zero.full_state_dict()" in said[name] for name in said if "load" not in name and name != "assign")
        assert all("zero.load_full_state_dict(state)" in said[name] for name in ("load", "load block", "assign"))


def state_within_forward(model):
    """What a block's state_dict is while the block computes."""
    seen, block = [], model.blocks[0]
    hook = block.up.register_forward_hook(lambda *_: seen.append(block.state_dict()["down.weight"].clone()))
    loss_of(model, TOKENS, TOKENS).backward()
    hook.remove()
    return seen


def test_what_is_whole_may_be_read():
    """In other stages, within a forward, by the parameters themselves, and after close()."""

    def on_rank():
        comm, expected = communicator("group"), Odd(0).double()
        for stage in STAGES:
            zero = odd_zero(comm, stage, seed=0)
            [seen] = state_within_forward(zero.model)
            assert torch.equal(seen, expected.blocks[0].down.weight)
            zero.zero_grad()
            if stage < 3:
                copied = copy.deepcopy(zero.model).state_dict()
                assert all(torch.equal(x, copied[name]) for name, x in zero.model.state_dict().items())
            assert (zero.model.state_dict(keep_vars=True)["embed.weight"].numel() > 0) == (stage < 3)
            assert zero.num_parameters == sum(p.numel() for p in expected.parameters())
            zero.close()
            assert values(copy.deepcopy(zero.model)).keys() == values(expected).keys()
            assert torch.equal(pickle.loads(pickle.dumps(zero.model)).embed.weight, expected.embed.weight)

    launch.run(on_rank, 2)


# Writes that the next step would overwrite


def written_in_place(model):
    with torch.no_grad():
        model.norm.weight.mul_(2)


def loaded(model):
    model.load_state_dict(Odd(3).to(model.norm.weight.dtype).state_dict())


def in_a_forward(model):
    hook = model.norm.register_forward_pre_hook(lambda *_: written_in_place(model))
    model(TOKENS)
    hook.remove()


@pytest.mark.parametrize(
    ("stage", "precision", "write"),
    [
        *((stage, "bf16", write) for stage in (0, 1, 2) for write in (written_in_place, loaded)),
        *((3, precision, in_a_forward) for precision in ("fp64", "bf16")),
    ],
)
def test_a_step_refuses_to_overwrite_what_was_written(stage, precision, write):
    def on_rank():
        zero = odd_zero(communicator("group"), stage, precision=precision)
        train(zero, range(2))
        write(zero.model)
        loss_of(zero.model, TOKENS, TOKENS).backward()
        said = refused(zero.step)
        zero.load_full_state_dict(zero.full_state_dict())
        zero.step()
        zero.zero_grad()
        train(zero, range(2))
        return said

    for said in launch.run(on_rank, 2):
        assert "was written to on the model, in place or by load_state_dict(), and step() would overwrite it" in said
        assert "zero.load_full_state_dict(state)" in said


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_is_written_where_the_optimizer_reads_it_stays(stage):
    def on_rank():
        zero = odd_zero(communicator("group"), stage, optimizer=partial(torch.optim.SGD, lr=0.0))
        loaded(zero.model)
        for group in zero.optimizer.param_groups:
            group["lr"] = 0.0
        train(zero, range(2))
        return zero.full_state_dict()["norm.weight"]

    for found in launch.run(on_rank, 2):
        assert torch.equal(found, Odd(3).double().norm.weight)
