"""Which traces are kept: decided at the head, when a request begins, or at the tail, when its duration is known.

    head    by a hash of the trace id       each process decides alone, and all alike     slow ones are lost as all are
    tail    what was slow or failed, and    someone holds every trace until it is over    no slow one is lost
            a share of the rest

A trace that is kept with probability p stands for 1 / p traces. Counts and sums with these weights are unbiased
(Horvitz and Thompson): their expectation is that of all traces, whatever was dropped.

Source: OpenTelemetry, "TraceState: probability sampling"; Horvitz and Thompson, 1952.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b


def _uniform(trace_id: str) -> float:
    """A number in [0, 1) that every process finds for this trace."""
    return int.from_bytes(blake2b(trace_id.encode(), digest_size=7).digest()) / 2**56


def _check_share(what: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{what} is between 0 and 1, got {share!r}")


@dataclass(frozen=True)
class HeadSampler:
    """Keeps a share of all traces, known before they begin; who keeps a larger share keeps these as well.

    Args:
        rate: share of traces to keep, 0 to 1.

    Raises:
        ValueError: if the rate is out of range.
    """

    rate: float

    def __post_init__(self) -> None:
        _check_share("a rate", self.rate)

    def weight(self, trace_id: str) -> float:
        """How many traces this one stands for: 1 / rate, or 0.0 if it is dropped."""
        return 1 / self.rate if _uniform(trace_id) < self.rate else 0.0


@dataclass(frozen=True)
class TailSampler:
    """Keeps each trace that was slow or failed, and a share of the rest.

    Args:
        slow_ns: duration in ns from which on a trace is slow.
        rate: share of the rest to keep, 0 to 1.

    Raises:
        ValueError: if an argument is out of range.

    Cost: the spans of all traces that are not over yet, wherever they are collected.
    """

    slow_ns: int
    rate: float

    def __post_init__(self) -> None:
        _check_share("a rate", self.rate)
        if not self.slow_ns >= 0:
            raise ValueError(f"a duration is 0 or more ns, got {self.slow_ns!r}")

    def weight(self, trace_id: str, duration_ns: int, failed: bool = False) -> float:
        """How many traces this one stands for: 1 if it was slow or failed, else 1 / rate, or 0.0 if it is dropped."""
        if failed or duration_ns >= self.slow_ns:
            return 1.0
        return HeadSampler(self.rate).weight(trace_id)


def rest_rate(volume: float, interesting: float) -> float:
    """The rate of a TailSampler that keeps as many traces as a HeadSampler would.

    Args:
        volume: share of all traces that may be kept.
        interesting: share of all traces that are slow or failed.

    Returns:
        (volume − interesting) / (1 − interesting).

    Raises:
        ValueError: if a share is out of range, or more is interesting than may be kept.
    """
    _check_share("a volume", volume)
    _check_share("the interesting share", interesting)
    if interesting > volume:
        raise ValueError(f"{interesting:.2%} of the traces are to be kept, in a volume of {volume:.2%}")
    return (volume - interesting) / (1 - interesting) if interesting < 1 else 0.0


def expected_kept(count: int, rate: float) -> tuple[float, float]:
    """How many of `count` traces head sampling keeps: expectation and standard deviation of a binomial distribution.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_share("a rate", rate)
    if count < 0:
        raise ValueError(f"a count is 0 or more, got {count!r}")
    return count * rate, math.sqrt(count * rate * (1 - rate))
