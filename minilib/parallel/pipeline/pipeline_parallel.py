"""Pipeline parallelism: each rank has some stages of the model, and microbatches go through them by a schedule.

    pipeline = PipelineParallel(model, comm, one_forward_one_backward(comm.world_size, num_microbatches=8))
    optimizer = torch.optim.AdamW(pipeline.parameters())
    loss = pipeline.step(cut_batch(token_ids, positions, targets, 8))       None but on the last stage's rank
    pipeline.clip_grad_norm(1.0)
    optimizer.step(); pipeline.zero_grad()

A step's gradients are those of the mean loss over all tokens of its batch, as on one process: each microbatch's mean
counts by its tokens. Nothing rescales what earlier steps have added up.

What a schedule is: schedule.py. How the model is cut: stage.py. What a step refuses: batch.py. What a stage does
with a microbatch: stage_work.py, split_backward.py. How results travel: messages.py.

In production: torch.distributed.pipelining, Megatron-LM, DeepSpeed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from minilib.mechanisms.pipelining import Interval
from minilib.model.decoder import Decoder
from minilib.parallel.global_norm import squared_norm
from minilib.parallel.pipeline.batch import batch_checksum, check_batch
from minilib.parallel.pipeline.checking import check_schedule
from minilib.parallel.pipeline.messages import StageMessages
from minilib.parallel.pipeline.pricing import StageTimes, times_of_stages
from minilib.parallel.pipeline.schedule import Action, PipelineSchedule
from minilib.parallel.pipeline.stage import DecoderStage, Microbatch, layers_per_stage, trained_parameters
from minilib.parallel.pipeline.stage_work import StageWork
from minilib.parallel.pipeline.tied import tied_copy
from minilib.ranks.agreement import checksum, gather_texts, same_shapes
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import CollectiveFailed

NO_LEAST = StageTimes(0.0, 0.0, 0.0)


class SchedulesDiffer(ValueError):
    """Ranks were given different schedules; the message says which rank, and where its schedule differs."""


class PipelineParallel:
    """One rank's stages of a model, and the step that runs them.

    Args:
        model: ranks begin with the weights of rank 0. It is left as it is, and this rank's stages share its parameters:
            let go of it to free the others.
        comm: between the schedule's ranks, over shared memory or a process group. Every method but those that say
            otherwise is a collective.
        schedule: the same on all ranks.
        layers: of each stage; as even as can be if left out. See `layers_per_stage`.
        least: seconds that each action takes at least: a rank that has computed earlier sleeps. So more ranks than
            cores run as if each had a core, and a laptop shows the timeline of a cluster.

    Attributes:
        stages: number → this rank's stages.
        spans: when this rank did each action of the latest step, by time.perf_counter; see `measured_timeline`.
        most_held: most pairs of a stage and a microbatch whose activations this rank held at a time in any step.

    Raises:
        SchedulesDiffer: if another rank was given another schedule or cut.
        UnsoundSchedule: if the schedule is not sound.
        StageWithoutLayers: if a stage would have none.
        RanksDiffer: if ranks have built different models.
        ValueError: if the schedule is for another number of ranks, or layers or least for another number of stages.

    Cost: a microbatch's activations at each boundary between stages on different ranks, and as much back.
    """

    def __init__(
        self,
        model: Decoder,
        comm: Communicator,
        schedule: PipelineSchedule,
        layers: Sequence[int] | None = None,
        least: StageTimes | Sequence[StageTimes] = NO_LEAST,
    ) -> None:
        _same_schedules(schedule, layers, comm)
        check_schedule(schedule)
        if schedule.num_ranks != comm.world_size:
            raise ValueError(f"{schedule.name} is for {schedule.num_ranks} ranks, and there are {comm.world_size}")
        counts = layers_per_stage(len(model.layers), schedule.num_stages) if layers is None else list(layers)
        if len(counts) != schedule.num_stages:
            raise ValueError(f"layers says how many each of {schedule.num_stages} stages has, got {counts}")
        self._least = times_of_stages(least, schedule.num_stages)
        self.stages = {stage: DecoderStage(model, counts, stage) for stage in schedule.stages_of(comm.rank)}
        same_shapes(model, comm)
        for tensor in (*model.parameters(), *model.buffers()):
            comm.broadcast(tensor)
        self.comm, self.schedule, self.most_held = comm, schedule, 0
        self.spans: list[Interval] = []
        self._hidden_size, self._dtype = model.config.hidden_size, model.embed.weight.dtype
        self._homes = _homes(model, counts)
        self._work = {stage: StageWork(module) for stage, module in self.stages.items()}
        self._messages = StageMessages(schedule, comm)
        self._tied = tied_copy(self.stages, schedule, comm.rank) if model.config.tie_embeddings else None
        self._steps = 0

    def step(self, microbatches: Sequence[Microbatch], num_tokens: int | None = None) -> float | None:
        """Forward and backward of a batch; gradients add to .grad.

        Args:
            microbatches: as many as the schedule has; the same on every rank, of any shapes.
            num_tokens: to divide the sum of the tokens' losses by, 1 or more; those of this batch that count if left
                out. Where several steps add up to one batch, that batch's.

        Returns:
            The mean loss in nats on the rank of the last stage, None elsewhere.

        Raises:
            RuntimeError, TypeError, ValueError: for what no step can run, see `check_batch`. Nothing is sent before,
                and where all ranks refuse, the communicator stays usable.
            CollectiveMismatch: if ranks have different microbatches or num_tokens, or step different pipelines.
            CollectiveFailed: if another rank is lost, failed or does not come in time.
        """
        microbatches, what = list(microbatches), f"step {self._steps + 1} of {self.schedule.name}"
        self.comm.guarded(lambda: None, what)  # what has failed before is said first
        try:
            check_batch(microbatches, num_tokens, self.schedule)
        except Exception:
            with suppress(CollectiveFailed):
                self.comm.barrier()  # returns where all ranks refuse; fails a rank that expects a microbatch
            raise
        self._steps += 1
        return self.comm.guarded(partial(self._run, microbatches, num_tokens), what)

    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters, each once, for an optimizer. No collective."""
        return list(dict(self.named_parameters()).values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with the names that they have in the model; a tied table is "embed.weight". No collective."""
        seen: set[nn.Parameter] = set()
        for stage in self.stages.values():
            for name, parameter in stage.named_parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    tied = self._tied is not None and parameter is self._tied.weight
                    yield "embed.weight" if tied else name, parameter

    def zero_grad(self) -> None:
        """Forget gradients. No collective."""
        for parameter in self.parameters():
            parameter.grad = None

    def grad_norm(self) -> float:
        """Norm of the gradients of the whole model, a tied table's counted once; the same on all ranks."""
        elsewhere = self._tied.weight if self._tied is not None and not self._tied.first else None
        counted = [p.grad for p in trained_parameters(list(self.stages.values()))
                   if p.grad is not None and p is not elsewhere]  # fmt: skip
        total = squared_norm(counted)
        self.comm.all_reduce(total)
        return math.sqrt(total)

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale gradients down if their norm is larger, as torch.nn.utils.clip_grad_norm_ does; the norm before."""
        norm = self.grad_norm()
        trained = trained_parameters(list(self.stages.values()))
        nn.utils.clip_grads_with_norm_(trained, max_norm, torch.tensor(norm, dtype=torch.float64))
        return norm

    def full_state_dict(self) -> dict[str, Tensor]:
        """Copies of the whole model's weights on every rank, with the keys of model.state_dict()."""
        mine = {name: value for stage in self.stages.values() for name, value in stage.state_dict().items()}
        whole = {}
        for name, (stage, empty) in self._homes.items():
            owner = self.schedule.rank_of[stage]
            value = mine[name].clone() if owner == self.comm.rank else torch.empty_like(empty, device="cpu")
            self.comm.broadcast(value, owner)
            whole[name] = value
        return whole

    def check_invariants(self) -> None:
        """Between steps no activations are held, and copies of a tied table are equal. A collective."""
        assert not any(work.num_held for work in self._work.values()), "activations of a step that is over"
        tables = torch.zeros(self.comm.world_size, dtype=torch.int64)
        if self._tied is not None:
            tables[self.comm.rank] = checksum(self._tied.weight)
        self.comm.all_reduce(tables)
        first, last = self.schedule.rank_of[0], self.schedule.rank_of[-1]
        assert tables[first] == tables[last], "the copies of the tied embedding differ"

    def _run(self, microbatches: list[Microbatch], num_tokens: int | None) -> float | None:
        counts = [microbatch.num_tokens for microbatch in microbatches]
        total = sum(counts) if num_tokens is None else num_tokens
        shapes = [torch.Size((*microbatch.token_ids.shape, self._hidden_size)) for microbatch in microbatches]
        self._messages.begin(shapes, self._dtype, batch_checksum(microbatches, num_tokens))
        self.spans = []
        if self._tied is not None:
            self._tied.begin()
        losses: list[Tensor] = []
        try:
            for action in self.schedule.actions[self.comm.rank]:
                weight = counts[action.microbatch] / total
                self._do(action, microbatches[action.microbatch], weight, losses)
                self.most_held = max(self.most_held, sum(work.num_held for work in self._work.values()))
            self._messages.end()
            if self._tied is not None:
                self._tied.end(self._messages.mail)
        except BaseException:
            if self._tied is not None:
                self._tied.undo()
            raise
        finally:
            for work in self._work.values():
                work.drop()
        return torch.stack(losses).double().sum().item() if losses else None

    def _do(self, action: Action, microbatch: Microbatch, weight: float, losses: list[Tensor]) -> None:
        """Take what the action reads, do it, and give its result to whoever reads that."""
        source = self.schedule.source_of(action)
        given = self._messages.take(source) if source is not None else None
        begun = time.perf_counter()
        result = self._compute(action, given, microbatch, weight)
        if least := self._least[action.stage].of(action.kind):
            time.sleep(max(0.0, begun + least - time.perf_counter()))
        self.spans.append(Interval(action, self.comm.rank, begun, time.perf_counter()))
        if action.kind == "F" and self.stages[action.stage].last:
            losses.append(result)
        elif result is not None:
            self._messages.give(action, result)

    def _compute(self, action: Action, given: Tensor | None, microbatch: Microbatch, weight: float) -> Tensor | None:
        work = self._work[action.stage]
        if action.kind == "F":
            return work.forward(action.microbatch, given, microbatch, weight)
        if action.kind == "B":
            return work.backward(action.microbatch, given)
        if action.kind == "I":
            return work.input_gradient(action.microbatch, given)
        return work.weight_gradients(action.microbatch)


def _same_schedules(schedule: PipelineSchedule, layers: Sequence[int] | None, comm: Communicator) -> None:
    mine = "\n".join([f"{schedule.name}, {schedule.num_microbatches} microbatches", f"stages on {schedule.rank_of}",
                      f"layers {None if layers is None else list(layers)}", str(schedule)])  # fmt: skip
    texts = [text.split("\n") for text in gather_texts(mine, comm)]
    for rank, theirs in enumerate(texts):
        if theirs != texts[0]:
            pairs = zip([*texts[0], "nothing"], [*theirs, "nothing"], strict=False)
            first, other = next((one, another) for one, another in pairs if one != another)
            raise SchedulesDiffer(f"rank 0 has [{first[:200]}], rank {rank} has [{other[:200]}]: all ranks must be "
                                  "given the same schedule")  # fmt: skip


def _homes(model: Decoder, counts: Sequence[int]) -> dict[str, tuple[int, Tensor]]:
    """For each key of the model's state the stage that has it, and a tensor without content of its shape."""
    stage_of_layer = [stage for stage, count in enumerate(counts) for _ in range(count)]
    homes = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        stage = {"embed": 0, "layers": None}.get(part, len(counts) - 1)
        stage = stage_of_layer[int(rest.split(".")[0])] if stage is None else stage
        homes[name] = (stage, torch.empty_like(value, device="meta"))
    return homes
