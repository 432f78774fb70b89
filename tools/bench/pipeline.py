"""Measure chapter 08: a pipeline step beside torch.distributed.pipelining, and bubbles beside their prices.

Called by `make bench`. Ratios come from steps taken in turns in one process, a rank's slowest counting for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from tqdm import tqdm

from minilib.mechanisms.pipelining import Timeline
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.parallel.pipeline import (
    SCHEDULES,
    Microbatch,
    PipelineParallel,
    PipelineSchedule,
    StageTimes,
    cut_batch,
    layers_per_stage,
    measured_timeline,
    price_schedule,
)
from minilib.parallel.pipeline.stage import DecoderStage
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.turns import seconds_in_turns
from tools.bench.training import summary

PEER = "torch.distributed.pipelining"
MODEL = ModelConfig(512, 128, 344, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=32, max_position=64,
                    tie_embeddings=False)  # fmt: skip
CONTEXT, SEQUENCES, MICROBATCHES, ROUNDS, WORLD_SIZES = 64, 1, 8, 25, (2, 4)

# Of the bubbles: stages sleep for longer than they compute, so that four ranks need no more than two cores.
TINY = ModelConfig(16, 8, 8, num_layers=8, num_heads=1, num_kv_heads=1, head_dim=8, max_position=4)
SHAPED, TURNS = StageTimes(forward=0.05, input_gradient=0.05, weight_gradient=0.05), 3


def pipeline() -> dict:
    """The figures of chapter 08, JSON values in SI units."""
    bar = tqdm(total=len(WORLD_SIZES) * (1 + len(SCHEDULES)), desc="pipelines", leave=False)

    def ranks(world_size: int, fn: Callable, *args):
        found = launch.run(fn, world_size, *args, timeout=300)
        bar.update()
        return found[0]

    with bar:
        return {
            "parameters": MODEL.num_parameters,
            "microbatches": MICROBATCHES,
            "tokens_per_microbatch": SEQUENCES * CONTEXT,
            "steps": [{"world_size": n, "methods": summary(ranks(n, _in_turns, ROUNDS), PEER)} for n in WORLD_SIZES],
            "bubbles": [ranks(n, _bubble, name, SHAPED) for n in WORLD_SIZES for name in SCHEDULES],
        }


def _batch(model: ModelConfig, sequences: int, context: int) -> list[Tensor]:
    tokens = torch.randint(model.vocab_size, (sequences, context + 1), generator=torch.Generator().manual_seed(0))
    return [tokens[:, :-1].contiguous(), torch.arange(context).expand(sequences, context), tokens[:, 1:].contiguous()]


def _in_turns(turns: int) -> dict[str, list[float]]:
    """Seconds of every 1F1B step, ours and theirs, of the same model."""
    steps = {name: partial(_step, *made()) for name, made in (("1f1b", _ours), (PEER, _theirs))}
    return seconds_in_turns(steps, turns=turns, warm_up=3)


def largest_difference() -> float:
    """Between the gradients of our step and theirs, on this rank: both train the same model on the same batch."""
    (step, ours), (their_step, theirs) = _ours(), _theirs()
    step()
    their_step()
    return max((one.grad - other.grad).abs().max().item() for one, other in zip(ours, theirs, strict=True))


def _step(step: Callable[[], object], parameters: list[nn.Parameter]) -> None:
    step()
    for parameter in parameters:
        parameter.grad = None


def _ours() -> tuple[Callable[[], object], list[nn.Parameter]]:
    """A step, and the parameters of this rank."""
    comm = Communicator(SharedMemoryTransport())
    trained = PipelineParallel(Decoder(MODEL), comm, SCHEDULES["1f1b"](comm.world_size, MICROBATCHES))
    batch = cut_batch(*_batch(MODEL, SEQUENCES * MICROBATCHES, CONTEXT), MICROBATCHES)
    return partial(trained.step, batch), trained.parameters()


class TheirStage(nn.Module):
    """Our stage as torch's pipelining wants it: one tensor in, one tensor out, the last one's are logits.

    Args:
        stage: one of a decoder's.
    """

    def __init__(self, stage: DecoderStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage.embed(x) if self.stage.first else x
        x = self.stage(x, torch.arange(x.shape[1]).expand(x.shape[:2]))
        return self.stage.unembed(self.stage.norm(x)) if self.stage.last else x


def _theirs() -> tuple[Callable[[], object], list[nn.Parameter]]:
    """The same of torch's."""
    rank, n = dist.get_rank(), dist.get_world_size()
    module = TheirStage(DecoderStage(Decoder(MODEL), layers_per_stage(MODEL.num_layers, n), rank))
    stage = PipelineStage(module, rank, n, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=_loss, scale_grads=False)
    tokens, _, targets = _batch(MODEL, SEQUENCES * MICROBATCHES, CONTEXT)
    given = (tokens,) if rank == 0 else ()
    wanted = {"target": targets, "losses": []} if rank == n - 1 else {}
    return partial(schedule.step, *given, **wanted), list(module.parameters())


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten()) / MICROBATCHES


def _bubble(name: str, times: StageTimes) -> dict:
    """The part of a step in which ranks wait, measured and predicted, the median of several steps."""
    comm = Communicator(SharedMemoryTransport())
    schedule: PipelineSchedule = SCHEDULES[name](comm.world_size, 2 * comm.world_size)
    trained = PipelineParallel(Decoder(TINY), comm, schedule, least=times)
    batch = cut_batch(*_batch(TINY, schedule.num_microbatches, 4), schedule.num_microbatches)
    timelines = [_timeline(trained, batch) for _ in range(1 + TURNS)][1:]
    predicted = price_schedule(schedule, times)
    return {
        "schedule": name, "world_size": comm.world_size, "microbatches": schedule.num_microbatches,
        "seconds": statistics.median(timeline.makespan for timeline in timelines),
        "predicted_seconds": predicted.seconds,
        "bubble": statistics.median(timeline.bubble for timeline in timelines), "predicted_bubble": predicted.bubble,
    }  # fmt: skip


def _timeline(trained: PipelineParallel, batch: list[Microbatch]) -> Timeline:
    """Of one step, on all ranks."""
    trained.comm.barrier()
    trained.step(batch)
    ranks: list = [None] * trained.comm.world_size
    dist.all_gather_object(ranks, trained.spans)
    return measured_timeline(ranks)


def lines(found: dict) -> Iterator[str]:
    """What was found, for people."""
    for row in found["steps"]:
        ours = next(method for method in row["methods"] if method["method"] == "1f1b")
        yield f"1f1b, {row['world_size']} ranks: {ours['seconds'] * 1e3:.0f} ms, {ours['over_peer']:.3f} of torch's"
    for row in found["bubbles"]:
        yield (f"{row['schedule']}, {row['world_size']} ranks: bubble {row['bubble']:.3f}, predicted "
               f"{row['predicted_bubble']:.3f}")  # fmt: skip
