"""Train the decoder: AdamW with warm-up and cosine decay, progress, a loss curve, and resume; on one process or many.

A run is decided by its config and its data alone. Batches are drawn from (seed, step), so a run that was stopped and
resumed takes the same steps as one that was not. Ranks share the sequences of each batch, and a rank may take its share
in several backwards, so a run takes the same steps on any number of ranks, up to the order in which sums are made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minilib.mechanisms.basics.files import written_whole
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.ranks.collectives import Communicator
from minilib.training import strategies, usage
from minilib.training.batches import RandomWindows, Share, batches_of
from minilib.training.config import PRECISIONS, TrainConfig, completed
from minilib.training.expert_balance import Balancer
from minilib.training.phases import StepPhases, no_phases
from minilib.training.planner.shape import TrainedShape


class CannotResume(ValueError):
    """The saved run is another run; the message says what differs."""


class Trainer:
    """One run: a model, its data, and everything that resuming needs.

    Args:
        model: trained in place.
        train: (tokens,) int64, all training texts in a row.
        validation: (tokens,) int64, held out.
        config: how to train.
        comm: between the ranks that share each batch; None on one process. On several ranks all methods are
            collectives, and all ranks pass the same data and config.
        parallel: what each rank keeps: "data", a replica of the model; "expert", a replica of all but the experts, and
            a part of those; "zero0" … "zero3", slices; "tensor", a part of every layer, with which all ranks compute
            every sequence together; "sequence", the same with the tokens divided between layers. No part of what the
            run is.
        machine: what the ranks run on, as measured, for `mfu`.
        phases: told when a phase of a step begins and ends; see phases.py.

    Attributes:
        grad_norms: of each step since this trainer was made, over all ranks, before clipping.
        samples: sequences that this rank has drawn since.

    Raises:
        ValueError: if a data row is shorter than one sequence and its next token, or for another `parallel`.

    Cost: see `TrainedShape.flops_per_token`.
    """

    def __init__(
        self,
        model: Decoder,
        train: Tensor,
        validation: Tensor,
        config: TrainConfig,
        comm: Communicator | None = None,
        parallel: str = "data",
        machine: Machine | None = None,
        phases: StepPhases = no_phases,
    ) -> None:
        for name, row in (("train", train), ("validation", validation)):
            if len(row) < config.context + 1:
                raise ValueError(
                    f"{name} has {len(row)} tokens; a context of {config.context} needs one more than that"
                )
        self.model, self.config, self.comm = model, config, comm
        self.rank, self.world_size = (comm.rank, comm.world_size) if comm is not None else (0, 1)
        self.train_tokens, self.validation_tokens = train, validation
        dealt_to = (0, 1) if parallel in strategies.SAME_BATCH else (self.rank, self.world_size)
        self._shares = dealt_to[1]  # into which a batch is dealt
        self._batches = batches_of(len(train), config, *dealt_to)
        self._validation_batches = RandomWindows(len(validation), config, *dealt_to)
        self.balancer = Balancer(model, config.balance, comm)
        self.strategy = strategies.choose_strategy(parallel, model, comm, config)
        self._peak = usage.peak_flops(machine, config.precision, comm) if machine is not None else None
        self._phase = phases
        self.step = 0
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.samples = 0
        self.validation_losses: list[tuple[int, float]] = []
        self.seconds = 0.0

    def run(
        self, until: int | None = None, after_step: Callable[[Trainer], None] = lambda trainer: None, bar: bool = True
    ) -> None:
        """Train up to a step, or to the end.

        Args:
            until: step to stop before; the end of the run if left out.
            after_step: called after every step, for instance to save.
            bar: show a progress bar, on rank 0.
        """
        last = min(self.config.steps, self.config.steps if until is None else until)
        hidden = self.rank > 0 or not bar
        with tqdm(total=self.config.steps, initial=self.step, desc="training", unit="step", disable=hidden) as shown:
            while self.step < last:
                started = time.perf_counter()
                self._train_step()
                self.seconds += time.perf_counter() - started
                shown.update()
                shown.set_postfix(self._progress())
                if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
                    self.validation_losses.append((self.step, self.validation_loss()))
                after_step(self)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; with ZeRO over this rank's slices."""
        return self.strategy.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Training tokens of all ranks per second of stepping so far."""
        tokens = self._batches.num_sequences(self.step) * self.config.context
        return tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation so far: FLOP/s that the model needs over what the machine reaches; None without one.

        Source: Chowdhery et al. 2022 (PaLM), section 4.1, with the measured peak instead of the data sheet's.
        """
        needed = TrainedShape.of(self.model.config).flops_per_token(self.config.context) * self.tokens_per_second
        return needed / self._peak if self._peak is not None else None

    def peak_memory(self) -> list[int]:
        """Bytes that each rank's process has held at most since it began."""
        return usage.peak_memory_per_rank(self.comm, self.model.embed.weight.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats per token over the validation batches."""
        count = self.config.validation_batches
        shares = (self._validation_batches.draw(-1 - number) for number in range(count))
        parts = (part for share in shares for part in self._parts(share, self.validation_tokens))
        return self._mean(sum(self._loss(tokens, weight).item() for tokens, weight in parts) / count)

    def save(self, path: Path) -> None:
        """Write everything that resuming needs to one file; a reader sees the old one or the new one. Rank 0 writes."""
        state = self.strategy.full_state_dict() | self.progress()
        if self.rank == 0:
            with written_whole(path) as partial:
                torch.save(state, partial)
        if self.comm is not None:
            self.comm.barrier()  # now the file is there for all ranks

    def resume(self, path: Path) -> None:
        """Go on where a saved run stopped, perhaps on another number of ranks, or with another `parallel`.

        Raises:
            CannotResume: if it was trained with another config, another model or other data.

        Cost: the file is mapped, so a rank reads what its strategy keeps of it: with ZeRO this rank's slices.
        """
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        self.check_same_run(state, path.name)
        self.strategy.load_full_state_dict(state)
        self.go_on_from(state)

    def progress(self) -> dict:
        """Which run this is, and how far it is: what is saved beside the strategy's state."""
        return {
            "config": self._identity(),
            "step": self.step,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "seconds": self.seconds,
        }

    def go_on_from(self, progress: Mapping) -> None:
        """Stand where `progress` says; the strategy's state is loaded beside it."""
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.losses = list(progress["losses"])
        self.validation_losses = [tuple(entry) for entry in progress["validation_losses"]]

    def check_same_run(self, progress: Mapping, where: str = "this checkpoint") -> None:
        """Raise CannotResume if another run saved `progress`, of which only "config" is read."""
        mine, theirs = self._identity(), self._saved_identity(progress["config"])
        differ = [f"{name} was {theirs[name]!r}, now {mine[name]!r}" for name in mine if theirs[name] != mine[name]]
        if differ:
            raise CannotResume(f"{where} is another run: {'; '.join(differ)}")

    def _identity(self) -> dict:
        """What makes this run this run: another value of any of these, and resuming would be another run.

        Neither `accumulate` nor the model's `kernels` is one of them: a run may move to a smaller machine, or to a GPU.
        """
        data = {"train data": _digest(self.train_tokens), "validation data": _digest(self.validation_tokens)}
        return _identity(asdict(self.config), asdict(self.model.config)) | data

    def _saved_identity(self, saved: Mapping[str, object]) -> dict:
        """The same of a saved run; what is newer than its file had its default then."""
        model = {name.removeprefix("model "): value for name, value in saved.items() if name.startswith("model ")}
        data = {name: saved.get(name) for name in ("train data", "validation data")}
        return _identity(completed(saved, self.config), completed(model, self.model.config)) | data

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.strategy.zero_grad()
        self.balancer.forget()
        total = sum(self._backward(tokens, weight, last) for tokens, weight, last in self._drawn())
        with self._phase("gradients"):
            self.grad_norms.append(self.strategy.clip_grad_norm(self.config.clip))
        with self._phase("optimizer"):
            self.strategy.step()
            self.balancer.step(self.config.rate(self.step) / self.config.learning_rate)
        with self._phase("loss"):
            self.losses.append(self._mean(total))
        self.step += 1

    def _drawn(self) -> Iterator[tuple[Tensor, float, bool]]:
        """For each backward of this step its tokens and weight, and whether it is the last."""
        with self._phase("data"):
            share = self._batches.draw(self.step)
            parts = list(self._parts(share, self.train_tokens))
        self.samples += len(share.starts)
        yield from ((*part, number == len(parts)) for number, part in enumerate(parts, start=1))

    def _backward(self, tokens: Tensor, weight: float, last: bool) -> float:
        """Add the gradients of some sequences; in the last backward of a step they leave for other ranks.

        Returns:
            The sequences' weighted loss.
        """
        with nullcontext() if last else self.strategy.no_sync():
            with self._phase("forward"):
                loss = self._loss(tokens, weight)
            with self._phase("backward"):
                (loss + self.balancer.penalty(weight)).backward()
        return loss.item()

    def _parts(self, share: Share, row: Tensor) -> Iterator[tuple[Tensor, float]]:
        """For each backward of a step its tokens, (sequences, context + 1), and what to multiply their mean loss by.

        So weighted, the mean over shares of their sums is the mean over all sequences. A part without a sequence takes
        one along with a weight of 0: all ranks go through the model, in which some strategies communicate.
        """
        for starts in share.parts(self.config.accumulate):
            yield self._tokens(row, starts or (0,)), len(starts) * self._shares / share.total

    def _tokens(self, row: Tensor, starts: Sequence[int]) -> Tensor:
        """Windows of a row, (sequences, context + 1), on the model's device."""
        windows = torch.stack([row[start : start + self.config.context + 1] for start in starts])
        return windows.to(self.model.embed.weight.device)

    def _loss(self, tokens: Tensor, weight: float) -> Tensor:
        """Mean loss in nats of predicting each token from those before it, times a weight.

        Args:
            tokens: (sequences, context + 1).
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = self.model.loss(inputs, positions, targets)
        return loss * weight

    def _mean(self, value: float) -> float:
        """Over ranks."""
        if self.comm is None:
            return value
        everybody = torch.tensor([value], dtype=torch.float64, device=self.comm.device)
        self.comm.all_reduce(everybody, "avg")
        return everybody.item()

    def _progress(self) -> dict[str, str]:
        utilisation = {"mfu": f"{self.mfu:.1%}"} if self.mfu is not None else {}
        return {"loss": f"{self.losses[-1]:.3f}", "tokens_per_s": f"{self.tokens_per_second:,.0f}"} | utilisation


def _identity(config: Mapping[str, object], model: Mapping[str, object]) -> dict:
    run = {name: value for name, value in config.items() if name != "accumulate"}
    return run | {f"model {name}": value for name, value in model.items() if name != "kernels"}


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:12]
