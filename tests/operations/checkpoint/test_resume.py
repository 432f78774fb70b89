"""A run that is saved and goes on takes the same steps as one that was not stopped: bit by bit on the same mesh."""

import pytest
import torch

from tests.operations.checkpoint.runs import goes_on, on_ranks, trains_and_saves

DENSE = ("data", "zero0", "zero1", "zero2", "zero3", "tensor", "sequence")
OTHER = [(0, "data"), (3, "zero3"), (3, "data"), (4, "zero2"), (2, "tensor"), (4, "sequence")]
EXPERTS = [("data", "expert"), ("expert", "data"), ("expert", "expert"), ("expert", "zero3")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One run a strategy on two ranks, each saved after half of its steps."""
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, {parallel: on_ranks(trains_and_saves, 2, folder, parallel) for parallel in DENSE}


def check_equal(found: dict, expected: dict) -> None:
    for key in ("losses", "validation", "step"):
        assert found[key] == expected[key], key
    assert torch.equal(found["drawn"], expected["drawn"])
    if "model" in expected:
        torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
        torch.testing.assert_close(found["optimizer"], expected["optimizer"], rtol=0, atol=0)


@pytest.mark.parametrize("parallel", DENSE)
def test_on_the_same_mesh_the_run_is_the_same_bit_by_bit(saved, parallel):
    folder, expected = saved
    found = on_ranks(goes_on, 2, folder, parallel, parallel)
    for mine, other in zip(found, expected[parallel], strict=True):
        check_equal(mine, other)
    assert not torch.equal(found[0]["drawn"], found[1]["drawn"]), "each rank has generators of its own"


@pytest.mark.parametrize(
    "world_size, after", [(0, "data"), (3, "zero3"), (3, "data"), (4, "zero2"), (2, "tensor"), (4, "sequence")]
)
@pytest.mark.parametrize("before", ["data", "zero1", "zero3", "sequence"])
def test_on_another_mesh_it_is_the_same_within_rounding(saved, before, world_size, after):
    folder, expected = saved
    found, expected = on_ranks(goes_on, world_size, folder, before, after)[0], expected[before][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["losses"][:3] == expected["losses"][:3]
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-3, atol=1e-4)
    steps = {float(state["step"]) for state in found["optimizer"]["state"].values()}
    assert steps == {6.0}


@pytest.mark.parametrize(
    "before, after", [("data", "expert"), ("expert", "data"), ("expert", "expert"), ("expert", "zero3")]
)
def test_a_mixture_of_experts_keeps_the_biases_of_its_balance(tmp_path, before, after):
    expected = on_ranks(trains_and_saves, 2, str(tmp_path), before, True)[0]
    found = on_ranks(goes_on, 2, str(tmp_path), before, after, True)[0]
    biases = [value for name, value in found["model"].items() if name.endswith("router.bias")]
    assert len(biases) == 2 and all(bias.abs().sum() > 0 for bias in biases)
    if before == after:
        check_equal(found, expected)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-3, atol=1e-4)
