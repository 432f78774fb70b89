"""Train the decoder on one process: AdamW with warm-up and cosine decay, progress, a loss curve, and resume.

A run is decided by its config and its data alone. Batches are drawn from (seed, step), so a run that was stopped and
resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minilib.model.decoder import Decoder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CannotResume(ValueError):
    """The saved run is another run; the message says what differs."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps.
        batch_size: sequences a step.
        context: tokens a sequence.
        learning_rate: at the end of warm-up.
        warmup: steps over which it rises from 0; it then falls along a cosine to a tenth.
        weight_decay: of matrices; vectors and the embedding are left alone.
        clip: largest global norm of the gradients.
        seed: decides batches; the model's own weights come with the model.
        precision: "fp32", or "bf16" to multiply matrices in bfloat16 while weights stay fp32.
        evaluate_every: steps between two looks at the validation loss.
        validation_batches: batches in such a look, always the same ones.

    Raises:
        ValueError: if a number makes no sense.
    """

    steps: int
    batch_size: int = 16
    context: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    evaluate_every: int = 250
    validation_batches: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "evaluate_every", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if not (self.learning_rate > 0 and self.clip > 0 and self.warmup >= 0):
            raise ValueError(f"learning_rate and clip must be positive and warmup ≥ 0; got {self}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One run: a model, its data, and everything that resuming needs.

    Args:
        model: trained in place.
        train: (tokens,) int64, all training texts in a row.
        validation: (tokens,) int64, held out.
        config: how to train.

    Raises:
        ValueError: if a data row is shorter than one sequence and its next token.

    Cost: 6 FLOPs per parameter and token, plus attention.
    """

    def __init__(self, model: Decoder, train: Tensor, validation: Tensor, config: TrainConfig) -> None:
        for name, row in (("train", train), ("validation", validation)):
            if len(row) < config.context + 1:
                raise ValueError(
                    f"{name} has {len(row)} tokens; a context of {config.context} needs one more than that"
                )
        self.model, self.config = model, config
        self.train_tokens, self.validation_tokens = train, validation
        self.optimizer = torch.optim.AdamW(
            _groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
        )
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
        bar = tqdm(total=self.config.steps, initial=self.step, desc="training", unit="step")
        with bar:
            while self.step < last:
                started = time.perf_counter()
                self._train_step()
                self.seconds += time.perf_counter() - started
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", tokens_per_s=f"{self.tokens_per_second:,.0f}")
                if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
                    self.validation_losses.append((self.step, self.validation_loss()))
                after_step(self)

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of stepping so far."""
        return self.step * self.config.batch_size * self.config.context / self.seconds if self.seconds else 0.0

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats per token over the validation batches."""
        batches = (self._batch(self.validation_tokens, -1 - k) for k in range(self.config.validation_batches))
        return sum(self._loss(tokens).item() for tokens in batches) / self.config.validation_batches

    def save(self, path: Path) -> None:
        """Write everything that resuming needs to one file; a reader sees the old one or the new one."""
        state = {
            "config": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Go on where a saved run stopped.

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
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
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
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.step += 1

    def _loss(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats of predicting each token from those before it; tokens is (batch, context + 1)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model.loss(inputs, positions, targets)

    def _batch(self, row: Tensor, step: int) -> Tensor:
        """Windows at places drawn from (seed, step): (batch_size, context + 1)."""
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + step)
        starts = torch.randint(len(row) - self.config.context, (self.config.batch_size,), generator=generator)
        windows = torch.stack([row[start : start + self.config.context + 1] for start in starts.tolist()])
        return windows.to(self.model.embed.weight.device)


def _groups(model: Decoder, weight_decay: float) -> list[dict]:
    """Matrices decay; norms and the embedding table do not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(("embed", "unembed"))]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name.startswith(("embed", "unembed"))]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:12]
