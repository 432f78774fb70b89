"""Which of several instances differs from the others: a slow replica of a service, a slow rank of a job.

The median and the median absolute deviation stay where they are while fewer than half of the values move, however far.
A mean and a standard deviation follow the very value that they are to expose: of n values none is more than
(n − 1) / √n standard deviations from the mean, so that with 10 instances "3 σ" can never be reached.

Source: Hampel, "The influence curve and its role in robust estimation", 1974; Shiffler, "Maximum Z scores and
outliers", 1988.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_SIDES = {"both": abs, "above": lambda distance: distance, "below": lambda distance: -distance}


def outliers(values: Sequence[float], factor: float = 5.0, floor: float = 0.0, side: str = "both") -> list[int]:
    """Positions of values that are far from the median, measured by the median absolute deviation.

    Args:
        values: one number per instance, all in one unit; fewer than 3 have no outlier.
        factor: robust standard deviations, NORMAL · MAD, that a value may be away from the median.
        floor: distance in the values' unit that is too small to matter, however equal the others are.
        side: "both"; "above", a large duration; "below", such as the wait of the rank for which all others wait.

    Returns:
        The positions in ascending order.

    Raises:
        ValueError: if a value is NaN or infinite, or an argument is out of range.
    """
    if not (0 < factor < math.inf and 0 <= floor < math.inf):
        raise ValueError(f"a factor is finite and above 0, a floor finite and 0 or more, got {factor=}, {floor=}")
    if side not in _SIDES:
        raise ValueError(f"side is one of {', '.join(_SIDES)}, got {side!r}")
    numbers = [float(value) for value in values]
    strange = [position for position, number in enumerate(numbers) if not math.isfinite(number)]
    if strange:
        raise ValueError(f"values are finite numbers; those at {strange} are not")
    if len(numbers) < 3:
        return []
    median = statistics.median(numbers)
    allowed = max(floor, factor * NORMAL * statistics.median([abs(number - median) for number in numbers]))
    return [position for position, number in enumerate(numbers) if _SIDES[side](number - median) > allowed]
