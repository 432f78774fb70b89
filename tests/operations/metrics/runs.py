"""A training run of two ranks with its metrics, small enough for a test."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.metrics.exposition import MetricsEndpoint
from minilib.operations.metrics.job_metrics import JobMetrics, watch_steps
from minilib.operations.metrics.rank_metrics import RankMetrics
from minilib.operations.metrics.utilisation import model_flops_per_token
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.group import GroupTransport
from minilib.training.config import TrainConfig
from minilib.training.planner.shape import TrainedShape
from minilib.training.trainer import Trainer

SHAPE = ModelConfig(31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
PEAK = 1e12
ROW = torch.randint(31, (500,), generator=torch.Generator().manual_seed(0))


def config(steps, accumulate=1):
    return TrainConfig(steps, batch_size=6, context=8, warmup=2, evaluate_every=10**6, accumulate=accumulate)


def trainer_of(settings, metrics, comm=None):
    return Trainer(Decoder(SHAPE), ROW, ROW, settings, comm, phases=metrics.phase)


def job_of(metrics, settings, **options):
    return JobMetrics(metrics, model_flops_per_token(TrainedShape.of(SHAPE), settings.context), PEAK, **options)


def train_until(stop, targets, fault):
    """Steps of 10 ms or more until the file `stop` is there; once `fault` is there, rank 1 does what it says."""
    comm = Communicator(GroupTransport())
    settings, rank = config(steps=100_000), dist.get_rank()
    metrics = RankMetrics("tiny", rank, dist.get_world_size(), durable=time.time())
    trainer = trainer_of(settings, metrics, comm)
    job = job_of(metrics, settings) if rank == 0 else None
    count = watch_steps(trainer, metrics, job)

    def after_step(trainer):
        count(trainer)
        time.sleep(0.01)
        if rank == 1 and Path(fault).exists():
            FAULTS[Path(fault).read_text()](trainer, stop)

    with MetricsEndpoint(metrics, Path(targets)):
        while not all_agree(comm, Path(stop).exists()):
            trainer.run(until=trainer.step + 1, after_step=after_step)
    return metrics.steps


def all_agree(comm, mine):
    everybody = torch.tensor([float(mine)])
    comm.all_reduce(everybody, "avg")
    return everybody.item() == 1


def hang(trainer, stop):
    while not Path(stop).exists():
        time.sleep(0.01)


def poison(trainer, stop):
    """One rank's weights become NaN, so its gradients, and with them the average of all ranks."""
    with torch.no_grad():
        trainer.model.norm.weight.fill_(torch.nan)


FAULTS = {"hang": hang, "poison": poison, "": lambda trainer, stop: None}
