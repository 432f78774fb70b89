"""Serving without a model: the engine as it is, with its scheduler and its policy, whose steps take what they cost.

    Engine             schedule → forward pass → tokens        time passes by itself
    SimulatedEngine    schedule → price of the step → tokens   the price is added to a VirtualClock

A forward pass decides nothing but which token comes next, and where the number of new tokens is fixed, no decision of
the scheduler depends on that. So both make the same plans, step for step, if requests join at the same steps.

A price is a function of what a step computes, `StepCounts`: from a machine's figures (MachinePrice), or fitted to steps
that were measured (FittedPrice).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import torch

from minilib.kernels.paged_attention import attention
from minilib.model.config import ModelConfig
from minilib.model.stored.layout import without_weights
from minilib.numbers.machine import Machine
from minilib.numbers.price import BYTES, Cost, Prediction, price
from minilib.serving.cache.paged import GPU_SHARE
from minilib.serving.engine import Engine
from minilib.serving.load.clock import VirtualClock
from minilib.serving.request import TokenOutput
from minilib.serving.sequence import Sequence
from minilib.serving.step_cost import pairs_behind, product_flops, weights_read

LAYER_CALLS = 9  # norm, q-k-v, rotary, store, attention, output; norm, gate and up, down


@dataclass(frozen=True)
class StepCounts:
    """What one step computes.

    Args:
        counts: tokens that each sequence computes.
        contexts: tokens that each has in the cache afterwards.
        rows: positions whose logits are needed.
        moved_tokens: slots of the pages that were moved from or to host memory.
    """

    counts: tuple[int, ...]
    contexts: tuple[int, ...]
    rows: int
    moved_tokens: int = 0

    @classmethod
    def of(cls, work: Row[tuple[Sequence, int]], moved_tokens: int = 0) -> StepCounts:
        """Of the plan that a scheduler made, before the step."""
        return cls(
            tuple(count for _, count in work),
            tuple(sequence.num_computed_tokens + count for sequence, count in work),
            sum(count == sequence.num_uncomputed_tokens for sequence, count in work),
            moved_tokens,
        )

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(self.counts)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one head of one layer."""
        each = zip(self.counts, self.contexts, strict=True)
        return sum(pairs_behind(context - count, count) for count, context in each)


class StepTaken(NamedTuple):
    """One step of an engine: when it began, how long it took, both in seconds, and what it computed."""

    started: float
    seconds: float
    counts: StepCounts


class CountingEngine(Engine):
    """An engine that notes what each of its steps computes.

    Attributes:
        history: the steps taken.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.history: list[StepTaken] = []
        self._swapped = 0

    def step(self) -> list[TokenOutput]:
        """One step."""
        self._swapped = self.cache.swap_pool.num_used
        return super().step()

    def _count(self, work: list[tuple[Sequence, int]]) -> StepCounts:
        moved = abs(self.cache.swap_pool.num_used - self._swapped)  # the scheduler moves out or in, never both
        return StepCounts.of(work, moved * self.cache.page_size)


class TimedEngine(CountingEngine):
    """An engine that takes the time of each of its steps, for a price to be fitted to.

    Args:
        arguments, options: of `Engine`.
    """

    def step(self) -> list[TokenOutput]:
        """One step; it is noted if it computed something."""
        self._counts: StepCounts | None = None
        started = time.perf_counter()
        outputs = super().step()
        if self._counts is not None:
            self.history.append(StepTaken(started, time.perf_counter() - started, self._counts))
        return outputs

    def _forward(self, work: list[tuple[Sequence, int]], interrupts: list[int]) -> torch.Tensor:
        self._counts = self._count(work)
        return super()._forward(work, interrupts)


class SimulatedEngine(CountingEngine):
    """An engine whose forward pass is a price; all its tokens are token 0.

    Args:
        config: of the model; it has no weights.
        price: seconds of a step.
        clock: what the steps advance; tokens are made at the time that it shows after a step.
        num_pages: pages of the KV cache, see `pages_that_fit`.
        options: more arguments of `Engine`.
    """

    def __init__(
        self,
        config: ModelConfig,
        price: Callable[[StepCounts], float],
        clock: VirtualClock,
        num_pages: int,
        **options,
    ) -> None:
        super().__init__(without_weights(config), num_pages, clock=clock.now, **options)
        self.price, self._time = price, clock

    def _forward(self, work: list[tuple[Sequence, int]], interrupts: list[int]) -> torch.Tensor:
        counts = self._count(work)
        started, seconds = self._time.now(), self.price(counts)
        self._time.advance(seconds)
        self.history.append(StepTaken(started, seconds, counts))
        return torch.zeros(counts.rows, 1)


class MachinePrice:
    """Steps priced on a machine: the products with the weights, then attention, then pages that move.

    What each reads and writes is counted once, and activations are not, as they stay in caches. The overhead of calls
    is the machine's; a data sheet has none, so that GPUs look as they would behind a host that is never late.

    Args:
        machine: measured or from a data sheet.
        config: of the model.
        dtype: of weights, activations and cache: "fp32", "bf16", "fp16".
        overhead: seconds that the engine spends in each step beside the model.
        host_link: which of the machine's links pages move over; None where none move.
    """

    def __init__(
        self,
        machine: Machine,
        config: ModelConfig,
        dtype: str = "bf16",
        overhead: float = 0.0,
        host_link: str | None = None,
    ) -> None:
        self.machine, self.config, self.dtype = machine, config, dtype
        self.overhead, self.host_link = overhead, host_link

    def __call__(self, counts: StepCounts) -> float:
        """Seconds of a step."""
        return self.predict(counts).seconds + self.overhead

    def predict(self, counts: StepCounts) -> Prediction:
        """The price without the engine's overhead, and what bounds it."""
        predicted = price(self.weights_cost(counts), self.machine) + price(self.attention_cost(counts), self.machine)
        if counts.moved_tokens:
            moved = counts.moved_tokens * self.config.kv_values_per_token * BYTES[self.dtype]
            predicted += price(Cost(messages=1, message_bytes=moved), self.machine, self.host_link)
        return predicted

    def weights_cost(self, counts: StepCounts) -> Cost:
        """Products with all weights, see `step_cost`; each weight is read once, new keys and values written."""
        config, tokens = self.config, counts.tokens
        values = weights_read(config, tokens, counts.rows) + tokens * config.kv_values_per_token
        flops = product_flops(config, tokens, counts.rows)
        return Cost(flops, BYTES[self.dtype] * values, calls=(LAYER_CALLS - 1) * config.num_layers, dtype=self.dtype)

    def attention_cost(self, counts: StepCounts) -> Cost:
        """Every query against the keys and values that it sees, which are read once for each sequence."""
        shape = (self.config.num_heads, self.config.num_kv_heads, self.config.head_dim)
        lengths = (list(counts.contexts), list(counts.counts))
        return self.config.num_layers * attention.cost(*shape, *lengths, dtype=self.dtype)


@dataclass(frozen=True)
class FittedPrice:
    """Steps priced by a linear model, whose coefficients are seconds and never negative.

        seconds = step + sequence · sequences + token · tokens + context · tokens in the cache + pair · pairs

    A measured step holds everything, the engine's own work included. The model knows no knee: it is good between the
    steps that it was fitted to.

    Args:
        step: of any step, such as for reading the weights.
        sequence: of each sequence.
        token: of each token that is computed.
        context: of each token in the cache of a sequence that computes.
        pair: of each pair of a query and a key that it sees.
    """

    step: float
    sequence: float
    token: float
    context: float
    pair: float

    def __call__(self, counts: StepCounts) -> float:
        """Seconds of a step."""
        return float(np.dot(astuple(self), _features(counts)))

    @classmethod
    def fit(cls, measured: Row[tuple[StepCounts, float]]) -> FittedPrice:
        """The coefficients with the least sum of squared relative errors.

        Args:
            measured: steps and their seconds, more than there are coefficients.

        Raises:
            ValueError: if there are too few steps, or one took no time.
        """
        features = np.array([_features(counts) for counts, _ in measured], dtype=float)
        seconds = np.array([seconds for _, seconds in measured], dtype=float)
        if len(measured) < 5 or not (seconds > 0).all():
            raise ValueError(f"5 measured steps or more are needed, each above 0 s; got {len(measured)}: {seconds}")
        relative = features / seconds[:, None]
        size = np.linalg.norm(relative, axis=0)
        used, found = np.flatnonzero(size), np.zeros(features.shape[1])
        while len(used):
            solution = np.linalg.lstsq(relative[:, used] / size[used], np.ones(len(seconds)), rcond=None)[0]
            if (solution >= 0).all():
                found[used] = solution / size[used]
                break
            used = np.delete(used, solution.argmin())  # a term that would make steps shorter explains nothing
        return cls(*found.tolist())


def _features(counts: StepCounts) -> tuple[int, ...]:
    """What a FittedPrice multiplies its coefficients with, in their order."""
    return 1, len(counts.counts), counts.tokens, sum(counts.contexts), counts.pairs


def pages_that_fit(
    machine: Machine, config: ModelConfig, page_size: int = 16, dtype: str = "bf16", share: float = GPU_SHARE
) -> int:
    """Pages of the KV cache beside the weights in a share of a machine's memory.

    Raises:
        ValueError: if there is no room for one page.
    """
    page_bytes = config.kv_values_per_token * page_size * BYTES[dtype]
    room = share * machine.memory_bytes - config.num_parameters * BYTES[dtype]
    if room < page_bytes:
        raise ValueError(
            f"{config.num_parameters / 1e9:.1f} G parameters in {dtype} leave no page of {page_bytes:,} bytes in "
            f"{share:.0%} of {machine.title}; take a larger machine or a smaller dtype"
        )
    return int(room // page_bytes)
