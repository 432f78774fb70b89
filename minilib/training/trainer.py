"""Train the decoder: AdamW with warm-up and cosine decay, progress, a loss curve, and resume; on one process or many.

A run is decided by its config and its data alone. Batches are drawn from (seed, step), so a run that was stopped and
resumed takes the same steps as one that was not. Ranks take every world_size-th sequence of the same batches, so a run
takes the same steps on any number of them, up to the order in which sums are made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.ranks.collectives import Communicator
from minilib.training import strategies, usage
from minilib.training.config import PRECISIONS, TrainConfig
from minilib.training.expert_balance import Balancer


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
        parallel: who keeps what then: "data", a replica each; "expert", a replica each of all but the
            experts; or "zero0" … "zero3". No part of what the run is.
        machine: what the ranks run on, as measured, for `mfu`.

    Raises:
        ValueError: if a data row is shorter than one sequence and its next token, or for another `parallel`.

    Cost: see `usage.flops_per_token`.
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
    ) -> None:
        for name, row in (("train", train), ("validation", validation)):
            if len(row) < config.context + 1:
                raise ValueError(
                    f"{name} has {len(row)} tokens; a context of {config.context} needs one more than that"
                )
        self.model, self.config, self.comm = model, config, comm
        self.rank, self.world_size = (comm.rank, comm.world_size) if comm is not None else (0, 1)
        self.train_tokens, self.validation_tokens = train, validation
        self._rows = range(self.rank, config.batch_size, self.world_size)  # of each batch, this rank's
        # So weighted, the mean over ranks of their mean losses is that over the tokens of the whole batch.
        self._weight = len(self._rows) * self.world_size / config.batch_size
        self.balancer = Balancer(model, config.balance, comm)
        self.engine = strategies.choose(parallel, model, comm, config)
        self._peak = usage.peak_flops(machine, config.precision, comm) if machine is not None else None
        self.step = 0
        self.losses: list[float] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.seconds = 0.0

    def run(self, until: int | None = None, after_step: Callable[[Trainer], None] = lambda trainer: None) -> None:
        """Train up to a step, or to the end.

        Args:
            until: step to stop before; the end of the run if left out.
            after_step: called after every step, for instance to save.
        """
        last = min(self.config.steps, self.config.steps if until is None else until)
        bar = tqdm(total=self.config.steps, initial=self.step, desc="training", unit="step", disable=self.rank > 0)
        with bar:
            while self.step < last:
                started = time.perf_counter()
                self._train_step()
                self.seconds += time.perf_counter() - started
                bar.update()
                bar.set_postfix(self._progress())
                if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
                    self.validation_losses.append((self.step, self.validation_loss()))
                after_step(self)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; in the ZeRO engines over this rank's slices."""
        return self.engine.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Training tokens of all ranks per second of stepping so far."""
        return self.step * self.config.batch_size * self.config.context / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation so far: FLOP/s that the model needs over what the machine reaches; None without one.

        Source: Chowdhery et al. 2022 (PaLM), section 4.1, with the measured peak instead of the data sheet's.
        """
        needed = usage.flops_per_token(self.model.config, self.config.context) * self.tokens_per_second
        return needed / self._peak if self._peak is not None else None

    def peak_memory(self) -> list[int]:
        """Bytes that each rank's process has held at most since it began."""
        return usage.peak_memory(self.comm, self.model.embed.weight.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats per token over the validation batches."""
        batches = (self._batch(self.validation_tokens, -1 - k) for k in range(self.config.validation_batches))
        return self._mean(sum(self._loss(tokens).item() for tokens in batches) / self.config.validation_batches)

    def save(self, path: Path) -> None:
        """Write everything that resuming needs to one file; a reader sees the old one or the new one. Rank 0 writes."""
        state = self.engine.full_state_dict() | {
            "config": self._identity(),
            "step": self.step,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "seconds": self.seconds,
        }
        if self.rank == 0:
            partial = path.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(path)
        if self.comm is not None:
            self.comm.barrier()  # now the file is there for all ranks

    def resume(self, path: Path) -> None:
        """Go on where a saved run stopped, perhaps on another number of ranks, or with another `parallel`.

        Raises:
            CannotResume: if it was trained with another config, another model or other data.
        """
        state = torch.load(path, weights_only=True, map_location=self.model.embed.weight.device)
        mine, theirs = self._identity(), state["config"]
        differ = [
            f"{name} was {theirs.get(name)!r}, now {mine[name]!r}" for name in mine if theirs.get(name) != mine[name]
        ]
        if differ:
            raise CannotResume(f"{path.name} is another run: {'; '.join(differ)}")
        self.engine.load_full_state_dict(state)
        self.step, self.losses, self.seconds = state["step"], state["losses"], state["seconds"]
        self.validation_losses = [tuple(entry) for entry in state["validation_losses"]]

    def _identity(self) -> dict:
        """What makes this run this run: another value of any of these, and resuming would be another run.

        Whose kernels compute the model is none of them: a run may move to a GPU.
        """
        model = {f"model {name}": value for name, value in asdict(self.model.config).items() if name != "kernels"}
        data = {"train data": _digest(self.train_tokens), "validation data": _digest(self.validation_tokens)}
        return asdict(self.config) | model | data

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss = self._loss(self._batch(self.train_tokens, self.step))
        self.engine.zero_grad()
        (loss + self.balancer.penalty(self._weight)).backward()
        self.engine.clip_grad_norm(self.config.clip)
        self.engine.step()
        self.balancer.step(self.config.rate(self.step) / self.config.learning_rate)
        self.losses.append(self._mean(loss.item()))
        self.step += 1

    def _loss(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats of predicting each token from those before it, weighted by this rank's part of the batch.

        Args:
            tokens: (sequences, context + 1), this rank's.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = self.model.loss(inputs, positions, targets)
        return loss * self._weight

    def _mean(self, value: float) -> float:
        """Over ranks."""
        if self.comm is None:
            return value
        everybody = torch.tensor([value], dtype=torch.float64, device=self.comm.device)
        self.comm.all_reduce(everybody, "avg")
        return everybody.item()

    def _batch(self, row: Tensor, step: int) -> Tensor:
        """This rank's of the windows at places drawn from (seed, step): (sequences, context + 1).

        A rank to which no sequence falls takes one along that weighs nothing: all ranks go through the model, in which
        some engines communicate.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + step)
        starts = torch.randint(len(row) - self.config.context, (self.config.batch_size,), generator=generator).tolist()
        mine = [starts[k] for k in self._rows or (0,)]
        windows = torch.stack([row[start : start + self.config.context + 1] for start in mine])
        return windows.to(self.model.embed.weight.device)

    def _progress(self) -> dict[str, str]:
        utilisation = {"mfu": f"{self.mfu:.1%}"} if self.mfu is not None else {}
        return {"loss": f"{self.losses[-1]:.3f}", "tokens_per_s": f"{self.tokens_per_second:,.0f}"} | utilisation


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:12]
