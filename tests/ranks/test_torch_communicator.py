"""The communicator over torch.distributed does what ours does: collectives and every engine, on gloo."""

import pytest

from minilib.ranks.launch import run
from tests.ranks import torch_communicator_cases as cases


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_collective(n):
    run(cases.collectives, n)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_engine_takes_the_steps_of_one_process(n):
    for found in run(cases.trainings, n):
        assert len(found) == 17
        cases.all_like_the_first(found)


def test_what_it_cannot_carry_is_refused_by_name():
    for device, strides, model in run(cases.refusals, 2):
        assert "a group of gloo carries tensors on cpu, got one on meta" in device
        assert "call .contiguous()" in strides
        assert "got one on meta" in model
