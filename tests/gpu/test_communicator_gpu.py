"""NCCL under the collectives, data parallelism, ZeRO and expert parallelism; as many ranks as there are GPUs."""

import pytest
import torch

from minilib.ranks.launch import run
from tests.ranks import torch_communicator_cases as cases
from tests.training.torch_communicator_cases import trains_saves_and_goes_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def world_sizes() -> list[int]:
    """1, and what else divides the experts of the cases."""
    return [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]


@pytest.mark.parametrize("n", world_sizes())
def test_every_collective(n):
    run(cases.collectives, n, backend="nccl", timeout=240)


@pytest.mark.parametrize("n", world_sizes())
def test_every_engine_takes_the_steps_of_one_process(n):
    for found in run(cases.trainings, n, backend="nccl", timeout=240):
        assert len(found) == 9
        cases.all_like_the_first(found)


@pytest.mark.parametrize("n", world_sizes())
def test_the_trainer_trains_saves_and_goes_on_in_every_strategy(n, tmp_path):
    run(trains_saves_and_goes_on, n, tmp_path, backend="nccl", timeout=240)
