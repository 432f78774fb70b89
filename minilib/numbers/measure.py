"""Honest timing: one function, several in turns, two against each other, and prediction against measurement.

A clock reading is a sample, never a fact. `measure` repeats until the median is worth reading and keeps every
sample; `measure_in_turns` and `compare` alternate A B A B in one process, so that a machine that slows down slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minilib.mechanisms.basics.format import Table, si
from minilib.numbers.neighbours import BUSY, Watch

MIN_SAMPLE_SECONDS = 1e-3  # a sample this long is a thousand times the clock's resolution


@dataclass(frozen=True)
class Measurement:
    """Seconds per call of one function, with every sample kept.

    Args:
        samples: seconds per call, one entry per sample, in the order taken.
        calls_per_sample: calls that each sample averages over.
        busy: share of the cores that others took meanwhile.
    """

    samples: tuple[float, ...]
    calls_per_sample: int = 1
    busy: float = 0.0

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a Measurement needs at least one sample, got none")

    @property
    def seconds(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of seconds per call: half of all samples lie between them."""
        return quartiles(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a fraction of the median: 0.02 is quiet, 0.5 is a noisy machine."""
        low, high = self.quartiles
        return (high - low) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        beside = f", others took {self.busy:.0%} of the cores" if self.busy > BUSY else ""
        return f"{si(self.seconds, 's')} ± {self.spread / 2:.0%} ({len(self.samples)} samples{beside})"


@dataclass(frozen=True)
class Comparison:
    """How many times longer `a` takes than `b`, from alternated runs.

    Args:
        ratios: a/b, one entry per A B pair.
        a: the samples of the first function.
        b: the samples of the second function.
    """

    ratios: tuple[float, ...]
    a: Measurement
    b: Measurement

    @property
    def ratio(self) -> float:
        """Median of a/b over the pairs; above 1 means that `b` is the faster one."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the pairwise ratio."""
        return quartiles(self.ratios)

    @property
    def busy(self) -> float:
        """Share of the cores that others took meanwhile."""
        return max(self.a.busy, self.b.busy)

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.ratio:.2f}× (half of {len(self.ratios)} pairs between {low:.2f}× and {high:.2f}×)"


def measure(fn: Callable[[], object], *, budget: float = 0.5, min_samples: int = 5) -> Measurement:
    """Time `fn()` until the median is worth reading.

    Warms up (first call, then a tenth of the budget), waits for the GPU at both ends of each sample, and packs
    enough calls into a sample that the clock's resolution cannot matter.

    Args:
        fn: called without arguments; its result is dropped.
        budget: seconds to spend on samples; a function slower than that still gets `min_samples`.
        min_samples: least number of samples, at least 1.

    Returns:
        The samples, in seconds per call.

    Raises:
        ValueError: if the budget is not positive or min_samples is below 1.

    Cost:
        about 1.1 × budget seconds, or (min_samples + 1) calls of a function slower than the budget.
    """
    _check(budget, min_samples)
    calls = _warm_up(fn, budget)
    samples: list[float] = []
    watch, started = Watch(), time.perf_counter()
    while len(samples) < min_samples or time.perf_counter() - started < budget:
        samples.append(_sample(fn, calls))
    return Measurement(tuple(samples), calls, watch.busy)


def measure_in_turns(
    fns: Mapping[str, Callable[[], object]], *, budget: float = 1.0, min_turns: int = 5
) -> dict[str, Measurement]:
    """Time several functions, one sample of each in every turn.

    Args:
        fns: functions by name, each called without arguments.
        budget: seconds to spend on all of them together.
        min_turns: least number of turns, at least 1.

    Returns:
        For each name its samples, as many as there were turns.

    Raises:
        ValueError: if there are no functions, the budget is not positive or min_turns is below 1.
    """
    _check(budget, min_turns)
    if not fns:
        raise ValueError("nothing to measure: fns is empty")
    calls = {name: _warm_up(fn, budget / len(fns)) for name, fn in fns.items()}
    samples: dict[str, list[float]] = {name: [] for name in fns}
    turns, watch, started = 0, Watch(), time.perf_counter()
    while turns < min_turns or time.perf_counter() - started < budget:
        for name, fn in fns.items():
            samples[name].append(_sample(fn, calls[name]))
        turns += 1
    busy = watch.busy
    return {name: Measurement(tuple(samples[name]), calls[name], busy) for name in fns}


def compare(a: Callable[[], object], b: Callable[[], object], *, budget: float = 1.0, min_pairs: int = 5) -> Comparison:
    """Time `a` and `b` alternately, A B A B …, and return the ratio of their times pair by pair.

    Args:
        a: first function, called without arguments.
        b: second function, called without arguments.
        budget: seconds to spend on both together.
        min_pairs: least number of pairs, at least 1.

    Returns:
        The ratio a/b with its spread, and the samples of both.

    Raises:
        ValueError: if the budget is not positive or min_pairs is below 1.
    """
    first, second = measure_in_turns({"a": a, "b": b}, budget=budget, min_turns=min_pairs).values()
    ratios = tuple(x / y for x, y in zip(first.samples, second.samples, strict=True))
    return Comparison(ratios, first, second)


@dataclass(frozen=True)
class Check:
    """One operation, priced before it was run and measured after.

    Args:
        name: what was run.
        prediction: anything with `seconds` and `bound`, in practice a `minilib.numbers.price.Prediction`.
        measurement: the measured counterpart.
    """

    name: str
    prediction: object
    measurement: Measurement

    @property
    def ratio(self) -> float:
        """Predicted over measured: 1 is a perfect price, below 1 the machine was slower than its price."""
        return self.prediction.seconds / self.measurement.seconds


def check_table(checks: list[Check], *, low: float = 0.67, high: float = 1.5) -> Table:
    """Lay predictions beside measurements; rows whose ratio lies outside [low, high] are marked for explanation."""
    rows = [
        (
            check.name,
            check.prediction.bound,
            si(check.prediction.seconds, "s"),
            si(check.measurement.seconds, "s"),
            f"{check.ratio:.2f}",
            "" if low <= check.ratio <= high else "explain",
        )
        for check in checks
    ]
    return Table(("operation", "bound", "predicted", "measured", "predicted / measured", ""), rows)


def median_ratio(checks: list[Check]) -> float:
    """Median of predicted over measured, the one number that says whether the prices can be trusted."""
    return statistics.median(check.ratio for check in checks)


def quartiles(samples: tuple[float, ...]) -> tuple[float, float]:
    """First and third quartile of the samples; a single sample is both."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def _check(budget: float, least: int) -> None:
    if not budget > 0:
        raise ValueError(f"budget is the time to spend in seconds and must be positive, got {budget!r}")
    if least < 1:
        raise ValueError(f"at least one sample is needed, got {least!r}; leave the argument out for the default")


def _warm_up(fn: Callable[[], object], budget: float) -> int:
    """Run `fn` until caches, allocators and compilers have settled; return the calls that fill one sample."""
    started = time.perf_counter()
    fastest = _sample(fn, 1)
    while time.perf_counter() - started < budget / 10:
        fastest = min(fastest, _sample(fn, 1))
    return max(1, round(MIN_SAMPLE_SECONDS / max(fastest, 1e-9)))


def _sample(fn: Callable[[], object], calls: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        fn()
    _synchronize()
    return (time.perf_counter() - started) / calls


def _synchronize() -> None:
    """Wait for the GPU, if this process has used one: its calls return before their work is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
