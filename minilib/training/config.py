"""What decides a training run, beside its model and its data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from minilib.training.expert_balance import BalanceConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps.
        batch_size: sequences a step, over all ranks.
        context: tokens a sequence.
        learning_rate: at the end of warm-up.
        warmup: steps over which it rises from 0; it then falls along a cosine to a tenth.
        weight_decay: of matrices; vectors and the embedding are left alone.
        clip: largest global norm of the gradients.
        seed: decides batches; the model's own weights come with the model.
        precision: "fp32", or "bf16" to multiply matrices in bfloat16 while weights stay fp32.
        evaluate_every: steps between two looks at the validation loss.
        validation_batches: batches in such a look, always the same ones.
        balance: how the load of a mixture's experts is kept even.

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
