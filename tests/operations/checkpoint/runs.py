"""Small training runs for tests of checkpoints: three steps, a save, three more; and the same run gone on elsewhere."""

from functools import cache

import torch
import torch.distributed as dist

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.operations.checkpoint import Checkpointer, RngState
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.expert_balance import BalanceConfig
from minilib.training.trainer import TrainConfig, Trainer

SHAPE = ModelConfig(31, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_position=64, qk_norm=True)
MIXTURE = ModelConfig(31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64,
                      moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8))  # fmt: skip
CONFIG = TrainConfig(steps=6, batch_size=6, context=8, warmup=2, evaluate_every=3, validation_batches=2)
BALANCED = TrainConfig(steps=6, batch_size=6, context=8, warmup=2, evaluate_every=3, validation_batches=2,
                       balance=BalanceConfig("both", rate=0.01))  # fmt: skip
ROW = torch.randint(31, (200,), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(31, (100,), generator=torch.Generator().manual_seed(1))
HALF = 3  # steps before the save


def comm_of_ranks() -> Communicator | None:
    return Communicator(SharedMemoryTransport()) if dist.is_initialized() else None


def trainer_of(parallel: str, comm: Communicator | None, mixture: bool = False, seed: int = 0) -> Trainer:
    model = Decoder(MIXTURE if mixture else SHAPE)
    model.initialize(seed + (comm.rank if comm else 0))
    return Trainer(model, ROW, HELD_OUT, BALANCED if mixture else CONFIG, comm, parallel)


def outcome(trainer: Trainer) -> dict:
    state = trainer.strategy.full_state_dict()
    return {"losses": trainer.losses, "validation": trainer.validation_losses, "step": trainer.step} | (state or {})


def trains_and_saves(folder: str, parallel: str, mixture: bool = False) -> dict:
    """Three steps, a save behind the fourth, and on to the end."""
    comm, own = comm_of_ranks(), comm_of_ranks()
    trainer = trainer_of(parallel, comm, mixture)
    rank, world_size = (comm.rank, comm.world_size) if comm else (0, 1)
    torch.manual_seed(100 + rank)
    with Checkpointer(f"{folder}/{parallel}", own, block_bytes=512) as checkpointer:
        trainer.run(HALF)
        checkpointer.save({"run": trainer, "rng": RngState(rank, world_size)}, trainer.step)
        drawn = torch.rand(3)
        trainer.run()
        assert checkpointer.wait() == HALF
    return outcome(trainer) | {"drawn": drawn}


def goes_on(folder: str, saved: str, parallel: str, mixture: bool = False) -> dict:
    """From that save to the end, on these ranks."""
    comm, own = comm_of_ranks(), comm_of_ranks()
    trainer = trainer_of(parallel, comm, mixture, seed=50)
    trainer.run(1)  # what it has trained is overwritten
    rank, world_size = (comm.rank, comm.world_size) if comm else (0, 1)
    with Checkpointer(f"{folder}/{saved}", own) as checkpointer:
        loaded = checkpointer.load({"run": trainer, "rng": RngState(rank, world_size, other_ranks="seed")})
    drawn = torch.rand(3)
    trainer.run()
    return outcome(trainer) | {"drawn": drawn, "loaded": loaded}


def on_ranks(function, world_size: int, *arguments) -> list[dict]:
    """A function on ranks; on one process for a world size of 0."""
    return run(function, world_size, *arguments, timeout=300) if world_size else [function(*arguments)]


@cache
def wholly_trained(mixture: bool = False) -> dict:
    trainer = trainer_of("data", None, mixture)
    trainer.run()
    return outcome(trainer)
