"""Saving and loading: on other numbers of ranks, in other stages, and the whole model's weights."""

import io
from functools import partial

import pytest
import torch

from minilib.parallel.zero import Zero
from minilib.parallel.zero.layout import Layout
from minilib.parallel.zero.ledger import STAGES
from minilib.parallel.zero.saving import IncompleteStates, OtherModel
from minilib.ranks import launch
from tests.parallel.zero.models import Odd, communicator, decoder, groups, largest_difference, odd_zero, train, values


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_and_continued(stage=3):
    """On each rank: its state after 5 steps, and the whole weights after 5 more."""
    zero = odd_zero(communicator("shared"), stage)
    train(zero, range(5))
    state = through_a_file(zero.state_dict())
    train(zero, range(5, 10))
    return state, zero.full_state_dict()


@pytest.fixture(scope="module")
def on_four():
    states, whole = zip(*launch.run(saved_and_continued, 4), strict=True)
    return states, {name: value for name, value in whole[0].items() if name != "seen"}


def continued(states, stages):
    comm = communicator("shared")
    found = []
    for stage in stages:
        zero = odd_zero(comm, stage, seed=7 + comm.rank)
        train(zero, range(90, 92))
        zero.load_state_dict(states)
        zero.check_invariants()
        train(zero, range(5, 10))
        found.append(zero.full_state_dict())
    return found


@pytest.mark.parametrize("world_size", [4, 3, 2, 1])
def test_what_four_ranks_saved_goes_on_as_if_never_stopped(on_four, world_size):
    states, expected = on_four
    for stages in launch.run(continued, world_size, states[::-1], STAGES):
        for state in stages:
            state.pop("seen")
            assert largest_difference(state, expected) < 1e-12
            assert world_size < 4 or all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_state_without_slices_loads_into_slices(on_four):
    _, expected = on_four
    states, _ = zip(*launch.run(saved_and_continued, 2, 0), strict=True)
    assert [state["num_slices"] for state in states] == [1, 1]
    for [state] in launch.run(continued, 3, states[:1], (3,)):
        state.pop("seen")
        assert largest_difference(state, expected) < 1e-12


def test_masters_and_moments_survive_bit_by_bit():
    """bf16 at 3 ranks, before any step and after some, to 2 and back to 3: the same bits of every element."""

    def saved(steps):
        zero = odd_zero(communicator("group"), 2, precision="bf16")
        train(zero, range(steps))
        return zero.state_dict()

    def loaded(states):
        zero = odd_zero(communicator("group"), 1, precision="bf16", seed=3)
        zero.load_state_dict(states)
        return zero.state_dict()

    for steps in (0, 3):
        states = launch.run(saved, 3, steps)
        back = launch.run(loaded, 3, launch.run(loaded, 2, states))
        for before, after in zip(states, back, strict=True):
            assert str(before) == str(after)  # options, names and the small tensors
            assert _tensors(before).keys() == _tensors(after).keys()
            assert all(torch.equal(x, _tensors(after)[path]) for path, x in _tensors(before).items())


def _tensors(tree, path=()):
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    if not isinstance(tree, dict):
        return {}
    return {key: x for name, branch in tree.items() for key, x in _tensors(branch, (*path, name)).items()}


def test_the_cuts_of_a_group_cover_it_once():
    layout = Layout("row", ("a", "b", "c"), ((3, 5), (4,), (1,)), (0, 1, 1), 4)
    assert (layout.numel, layout.length, layout.slices) == (20, 20, [(0, 5), (5, 10), (10, 15), (15, 20)])
    assert layout.group_cut(0, layout.slices) == [(0, 5), (5, 10), (10, 15), (15, 15)]
    assert layout.group_cut(1, layout.slices) == [(0, 0), (0, 0), (0, 0), (0, 5)]


# The whole model


def test_the_full_state_is_the_models_own():
    def on_rank(trained):
        comm = communicator("shared")
        found = []
        for stage in STAGES:
            zero = odd_zero(comm, stage, seed=comm.rank)
            whole, for_one = zero.full_state_dict(), zero.full_state_dict(rank=0)
            zero.load_full_state_dict(trained if comm.rank == 0 else None)
            zero.check_invariants()
            found.append((whole, for_one, zero.full_state_dict(), values(zero.model) if stage < 3 else None))
        return found

    model, trained = Odd(0).double(), Odd(5).double().state_dict()
    for rank, stages in enumerate(launch.run(on_rank, 2, trained)):
        for whole, for_one, loaded, in_use in stages:
            assert list(whole) == list(model.state_dict())
            assert all(torch.equal(whole[name], x) for name, x in model.state_dict().items() if name != "seen")
            assert for_one.keys() == (whole.keys() if rank == 0 else set())
            assert all(torch.equal(loaded[name], x) for name, x in trained.items())
            assert in_use is None or all(torch.equal(x, trained[name]) for name, x in in_use.items())


def test_close_leaves_a_whole_model_behind():
    def on_rank():
        comm = communicator("group")
        zero = Zero(decoder(comm.rank), comm, 3)
        zero.close()
        tokens = torch.arange(8)[None]
        zero.model.loss(tokens, tokens, tokens).backward()
        return zero.model.state_dict(), zero.model.embed.weight.grad is not None, "loss" in vars(zero.model)

    for state, has_gradient, wrapped in launch.run(on_rank, 2):
        assert has_gradient and not wrapped
        assert all(torch.equal(value, decoder(0).state_dict()[name]) for name, value in state.items())


# Refusals


def refusals(comm, zero):
    """What each wrong state is answered with."""
    good = zero.full_state_dict()
    wrong = {
        "missing": {name: value for name, value in good.items() if name != "norm.bias"},
        "unknown": {**good, "extra": torch.zeros(1)},
        "shape": {**good, "blocks.1.gain": torch.zeros(2)},
        "none": None,
    }
    said = {}
    for name, state in wrong.items():
        with pytest.raises(OtherModel) as error:
            zero.load_full_state_dict(state)
        said[name] = str(error.value)
    own = zero.state_dict()
    row = own["rows"]["blocks.1"]
    wrong = {
        "alone": own,
        "empty": [],
        "incomplete": [own],
        "rows": [{**own, "num_slices": 1, "slice": 0, "rows": {**own["rows"], "blocks.9": row}}],
        "fewer rows": [{**own, "num_slices": 1, "slice": 0, "rows": {"outer": own["rows"]["outer"]}}],
        "names": [{**own, "num_slices": 1, "slice": 0, "rows": {**own["rows"], "blocks.1": own["rows"]["blocks.3"]}}],
        "groups": [{**own, "num_slices": 1, "slice": 0, "param_groups": own["param_groups"][:1]}],
    }
    for name, states in wrong.items():
        with pytest.raises((OtherModel, IncompleteStates)) as error:
            zero.load_state_dict(states)
        said[name] = str(error.value)
    return said


def test_states_of_another_model_are_refused_by_key():
    def on_rank():
        comm = communicator("group")
        return refusals(comm, odd_zero(comm, 3))

    first, second = launch.run(on_rank, 2)
    assert first["missing"] == "the state has no norm.bias, which this model has"
    assert first["unknown"] == "the state has extra, which this model has not"
    assert first["shape"] == "blocks.1.gain is (1,) here and (2,) in the state"
    assert first["none"] == "rank 0 has the state to load, and got None"
    assert second["missing"] == "rank 0 has refused the state; its error says why"
    assert "in a list" in first["alone"] and "in a list" in first["empty"]
    assert "saved as 2 slices; got [0], missing [1]" in first["incomplete"]
    assert "the state has a unit 'blocks.9'" in first["rows"]
    assert "this model has a unit 'blocks.0', and the other has none" in first["fewer rows"]
    assert "blocks.1.down.weight: here (shape, group) is ([5, 7], 0), in the state it is nothing" in first["names"]
    assert first["groups"] == "param_groups: the state has 1, here are 2"


def test_other_units_or_groups_are_another_model():
    def on_rank(states):
        comm = communicator("group")
        sgd = partial(torch.optim.SGD, lr=0.1)
        one_group = Zero(Odd(0).double(), comm, 3, sgd, precision="fp64")
        with pytest.raises(OtherModel, match="param_groups: the state has 2, here are 1|weight: here"):
            one_group.load_state_dict(states)
        one_unit = Zero(Odd(0).double(), comm, 3, sgd, precision="fp64", blocks=(), param_groups=groups)
        with pytest.raises(OtherModel, match="outer|blocks.0") as error:
            one_unit.load_state_dict(states)
        return str(error.value)

    states, _ = zip(*launch.run(saved_and_continued, 1), strict=True)
    assert "load it into the model, blocks and param_groups that it was saved from" in launch.run(on_rank, 1, states)[0]
