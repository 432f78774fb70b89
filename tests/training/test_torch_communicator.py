"""Training over torch.distributed, on gloo; tests/gpu does the same on NCCL."""

import pytest

from minilib.ranks.launch import run
from tests.training import torch_communicator_cases as cases


@pytest.mark.parametrize("n", [1, 2])
def test_every_strategy_trains_saves_and_goes_on(n, tmp_path):
    run(cases.trains_saves_and_goes_on, n, tmp_path)
