"""What decides a training run, besides its model and its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass

import torch

from minilib.training.expert_balance import BalanceConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLINGS = ("windows", "epoch")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps.
        batch_size: sequences a step, over all ranks and all backwards of the step.
        context: tokens a sequence.
        learning_rate: at the end of warm-up.
        warmup: steps over which it rises from 0; it then falls along a cosine to a tenth.
        weight_decay: of matrices; vectors and the embedding are left alone.
        clip: largest global norm of the gradients.
        seed: decides batches; the model's own weights come with the model.
        precision: "fp32", or "bf16" to multiply matrices in bfloat16. The optimizer updates float32 weights either way;
            with ZeRO and "bf16" forward and backward use bfloat16 copies of them (see `parallel.zero.ledger`).
        evaluate_every: steps between two evaluations of the validation loss.
        validation_batches: batches of an evaluation, always the same ones.
        balance: how the load of a mixture's experts is kept even.
        sampling: "windows", at random places, or "epoch", each window once an epoch; see `batches`.
        accumulate: backwards a step, each of a part of the batch, so that activations of one part are held at a time.
            How a step is made and no part of what the run is: it may change when a run is resumed.

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
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    sampling: str = "windows"
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "evaluate_every", "validation_batches", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling is one of {', '.join(SAMPLINGS)}; got {self.sampling!r}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is at most batch_size, since a backward needs a sequence; got {self.accumulate} backwards "
                f"for {self.batch_size} sequences"
            )
        if not (self.learning_rate > 0 and self.clip > 0 and self.warmup >= 0):
            raise ValueError(f"learning_rate and clip must be positive and warmup ≥ 0; got {self}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def completed(saved: Mapping[str, object], config: object) -> dict[str, object]:
    """A saved config, as asdict has it, with the defaults of fields that did not exist when it was saved.

    Args:
        saved: such a dict, perhaps of an earlier version.
        config: a dataclass with the fields that there are now, which may be dataclasses in turn.
    """
    found = {}
    for each in fields(config):
        value, now = saved.get(each.name, _default(each)), getattr(config, each.name)
        found[each.name] = completed(value, now) if is_dataclass(now) and isinstance(value, Mapping) else value
    return found


def _default(of: Field) -> object:
    """As asdict has it; None for a field without one."""
    value = of.default_factory() if of.default_factory is not MISSING else of.default
    return None if value is MISSING else asdict(value) if is_dataclass(value) else value
