"""Whether a row of numbers grows, and how fast, whatever a few of them say.

    slope          median of the slopes between all pairs (Theil–Sen): up to 29 % of the numbers may be outliers
    significance   pairs that rise less pairs that fall, in standard deviations of that difference without a trend
                   (Mann–Kendall)

Sources: Sen 1968, "Estimates of the regression coefficient based on Kendall's tau"; Mann 1945; Kendall 1975.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_POINTS = 400  # of which all pairs are compared; of a longer row points at even distances


def robust_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Growth of y for one of x; 0 for fewer than two different x.

    Raises:
        ValueError: if the rows differ in length, or hold something that is no finite number.
    """
    rises, runs = _pairs(xs, ys)
    return float(np.median(rises[runs != 0] / runs[runs != 0])) if (runs != 0).any() else 0.0


def trend_significance(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Standard deviations by which rising pairs outnumber falling ones; above 3 chance is improbable, 0 is no trend.

    Raises:
        ValueError: as `robust_slope`.
    """
    rises, runs = _pairs(xs, ys)
    score = int(np.sum(np.sign(rises) * np.sign(runs)))
    if score == 0:
        return 0.0
    count = len(_thinned(np.asarray(ys)))
    _, ties = np.unique(_thinned(np.asarray(ys)), return_counts=True)
    variance = (_pair_variance(count) - sum(_pair_variance(int(tie)) for tie in ties)) / 18
    return float((score - np.sign(score)) / variance**0.5)


def _pair_variance(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)


def _pairs(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each pair the difference of y and of x."""
    if len(xs) != len(ys):
        raise ValueError(f"one x for each y is needed, got {len(xs)} and {len(ys)}")
    x, y = (_thinned(np.asarray(row, dtype=np.float64)) for row in (xs, ys))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a trend needs finite numbers; leave out NaN and infinity, or tell of them separately")
    first, second = np.triu_indices(len(x), 1)
    return y[second] - y[first], x[second] - x[first]


def _thinned(row: np.ndarray) -> np.ndarray:
    if len(row) <= MOST_POINTS:
        return row
    return row[np.linspace(0, len(row) - 1, MOST_POINTS).astype(int)]
