"""Calls on the model of stage 3 that would read, write or copy empty parameters: refused by name."""

import copy
import io
import pickle

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
