"""Durations in buckets that grow by a factor: small, mergeable, and wrong by no more than is known beforehand.

    growth 1.1     bucket i holds the values in (1.1^(i−1), 1.1^i]     its estimate 2 · 1.1^i / 2.1 is off by ≤ 4.8 %

Percentiles of parts cannot be combined: the mean of two p99s is the p99 of nothing. Counts of buckets can, since equal
bounds make a sum of counts the histogram of the union.

Source: Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees",
VLDB 2019; OpenTelemetry and Prometheus call such a histogram exponential, or native.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from numbers import Real

_LARGEST = math.log(sys.float_info.max)  # exponents above it overflow


class Histogram:
    """Counts of values ≥ 0 in exponential buckets.

    Args:
        growth: upper over lower bound of a bucket, above 1.

    Attributes:
        growth: as given.
        count: values added so far, or the sum of their weights.
        total: their sum, in the values' unit.
        minimum, maximum: the smallest and the largest value, exact; inf and -inf if there is none.

    Raises:
        ValueError: if the growth is not finite or not above 1.

    Cost: O(1) to add; one counter for each bucket in use, log(maximum / minimum) / log(growth) of them at most.
    """

    def __init__(self, growth: float = 1.1) -> None:
        if not 1 < growth < math.inf:
            raise ValueError(f"buckets grow by a finite factor above 1, got {growth!r}")
        self.growth, self.count, self.total = growth, 0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self._log_growth, self._zeros = math.log(growth), 0
        self._counts: dict[int, float] = {}

    @classmethod
    def of(cls, values: Iterable[float], growth: float = 1.1) -> Histogram:
        """The histogram of these values."""
        histogram = cls(growth)
        for value in values:
            histogram.add(value)
        return histogram

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """The histogram of all values of these parts, which stay as they are.

        Raises:
            ValueError: if there is no part, or their growths differ.
        """
        first, *others = [*parts] or [None]
        if first is None:
            raise ValueError("needs one histogram or more, got none")
        merged = cls(first.growth)
        for part in (first, *others):
            merged.merge(part)
        return merged

    @property
    def error(self) -> float:
        """The largest relative error of a quantile, (growth − 1) / (growth + 1)."""
        return (self.growth - 1) / (self.growth + 1)

    @property
    def mean(self) -> float:
        """The mean of the values, exact; NaN if there is none."""
        return self.total / self.count if self.count else math.nan

    def add(self, value: float, weight: float = 1) -> None:
        """Count a value; with a weight, as often as that: a sampled request stands for 1 / rate requests.

        Raises:
            ValueError: if the value is negative or not finite, or the weight is not finite or not above 0.
        """
        if not isinstance(value, Real) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"a value is finite and 0 or more, got {value!r}")
        if not 0 < weight < math.inf:
            raise ValueError(f"a weight is finite and above 0, got {weight!r}")
        if value == 0:
            self._zeros += weight
        else:
            index = math.ceil(math.log(value) / self._log_growth)
            self._counts[index] = self._counts.get(index, 0) + weight
        self.count += weight
        self.total += weight * float(value)
        self.minimum, self.maximum = min(self.minimum, value), max(self.maximum, value)

    def merge(self, other: Histogram) -> None:
        """Add all values of another histogram; nothing is lost by it.

        Raises:
            ValueError: if the growths differ, since the buckets then do not coincide.
        """
        if other.growth != self.growth:
            raise ValueError(f"only equal growths merge exactly, got {self.growth} and {other.growth}")
        for index, count in list(other._counts.items()):
            self._counts[index] = self._counts.get(index, 0) + count
        self._zeros += other._zeros
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total += other.total
        self.count += other.count

    def quantile(self, q: float) -> float:
        """The smallest value that a share q of all do not exceed, to within `error`; NaN if there is no value.

        Raises:
            ValueError: if q is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is between 0 and 1, got {q!r}")
        if not self.count:
            return math.nan
        left, index = q * self.count - self._zeros, None
        for bucket in () if self._zeros and left <= 0 else sorted(self._counts):
            index, left = bucket, left - self._counts[bucket]
            if left <= 0:
                break  # or else weights were rounded, and the last bucket is the answer
        if index is None:
            return 0.0
        lower = math.exp(min((index - 1) * self._log_growth, _LARGEST))
        return min(max(lower * (2 * self.growth / (self.growth + 1)), self.minimum), self.maximum)

    def buckets(self) -> list[tuple[float, float]]:
        """Upper bound and count of each bucket in use, lowest first; the bound 0 is that of the value 0."""
        zeros = [(0.0, self._zeros)] if self._zeros else []
        return zeros + [
            (math.exp(min(index * self._log_growth, _LARGEST)), self._counts[index]) for index in sorted(self._counts)
        ]

    def check_invariants(self) -> None:
        """Every value is in one bucket, and quantiles lie between minimum and maximum."""
        counted = self._zeros + sum(self._counts.values())
        assert math.isclose(counted, self.count, rel_tol=1e-9), f"{counted} in buckets of {self.count}"
        assert not self.count or self.minimum <= self.quantile(0.5) <= self.maximum, "a median outside the values"
