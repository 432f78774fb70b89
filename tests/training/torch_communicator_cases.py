"""What every rank does to train over a TorchCommunicator: the same on gloo and, on its own device, on NCCL."""

from pathlib import Path

import pytest
import torch

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.ranks.torch_communicator import TorchCommunicator
from minilib.training.expert_balance import BalanceConfig
from minilib.training.strategies import PARALLEL
from minilib.training.trainer import TrainConfig, Trainer

SHAPE = ModelConfig(31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64,
                    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8))  # fmt: skip
CONFIG = TrainConfig(
    steps=4,
    batch_size=5,
    context=8,
    warmup=2,
    evaluate_every=2,
    validation_batches=1,
    balance=BalanceConfig("bias"),
    sampling="epoch",
    accumulate=2,
)
ROW = torch.randint(31, (100,), generator=torch.Generator().manual_seed(0))


def trainer(comm: TorchCommunicator | None, parallel: str, device: torch.device, seed: int = 0) -> Trainer:
    model = Decoder(SHAPE)
    model.initialize(seed)
    return Trainer(model.to(device), ROW, ROW, CONFIG, comm, parallel)


def trains_saves_and_goes_on(folder: Path) -> None:
    """Every strategy, stopped and resumed, has the losses and weights of one process that was not."""
    comm = TorchCommunicator()
    alone = trainer(None, "data", comm.device)
    alone.run()
    expected = alone.strategy.full_state_dict()["model"]
    for parallel in PARALLEL:
        path = folder / f"{parallel}.pt"
        first = trainer(comm, parallel, comm.device, seed=comm.rank)
        first.run(until=2)
        first.save(path)
        second = trainer(comm, parallel, comm.device, seed=7)
        second.resume(path)
        second.run()
        assert second.losses == pytest.approx(alone.losses, rel=1e-4), parallel
        found = second.strategy.full_state_dict()
        assert found or comm.rank, parallel
        for name, value in found.get("model", {}).items():
            assert value.device == comm.device
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4)
