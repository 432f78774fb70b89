"""Which call makes slow requests slow: the critical paths of slow requests against those of ordinary ones.

For every request, the time on its critical path is split among its spans, by service and name. In a slow request each
has an excess: its time there less its median time in ordinary requests. The call to which more than half of all excess
belongs is guilty, and if it happened in one instance nearly always, that instance is.

It is self time that counts: a caller that waits has none, so blame falls on what was waited for and not on who waited.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from minilib.mechanisms.telemetry import Trace

IN_ONE_INSTANCE = 0.8  # share of a guilty call's time; of four instances alike each has a quarter
Call = tuple[str, str]  # service and name of a span


class GuiltyCall(NamedTuple):
    """What slow requests have in common.

    Args:
        service: whose span it is.
        process: the instance in which it happened, such as "store/2"; None if several share it.
        name: of the span.
        share: of all the time by which slow requests are slower than ordinary ones, about 0 to 1.
        slow: how many requests are slow.
        extra_ns: by how much they are slower there, on average, in ns.
    """

    service: str
    process: str | None
    name: str
    share: float
    slow: int
    extra_ns: float


def find_guilty_call(traces: Sequence[Trace], slow_ns: float | None = None, fewest: int = 3) -> GuiltyCall | None:
    """The call that makes slow requests slow.

    Args:
        traces: one for each request.
        slow_ns: duration in ns above which a request is slow, such as an SLO; None for twice the median.
        fewest: slow requests below which nobody is accused.

    Returns:
        The guilty call; None if too few requests are slow, none is ordinary, or no call has more than half the excess.

    Raises:
        ValueError: if slow_ns is negative.
    """
    if slow_ns is None:
        slow_ns = 2 * statistics.median([trace.duration_ns for trace in traces]) if traces else 0
    if slow_ns < 0:
        raise ValueError(f"a duration is 0 or more ns, got {slow_ns!r}")
    slow = [path_times(trace) for trace in traces if trace.duration_ns > slow_ns]
    ordinary = [path_times(trace) for trace in traces if trace.duration_ns <= slow_ns]
    if len(slow) < max(1, fewest) or not ordinary:
        return None
    excess = {}
    for call in sorted({call for times in slow + ordinary for call in times}):
        typical = statistics.median(times[call].total() if call in times else 0 for times in ordinary)
        excess[call] = sum(times[call].total() for times in slow if call in times) - len(slow) * typical
    guilty, total = max(excess, key=excess.get), sum(excess.values())
    if excess[guilty] <= total / 2:
        return None
    by_process = sum((times[guilty] for times in slow if guilty in times), Counter())
    process, its_time = by_process.most_common(1)[0]
    alone = its_time >= IN_ONE_INSTANCE * by_process.total()
    share, extra_ns = excess[guilty] / total, excess[guilty] / len(slow)
    return GuiltyCall(guilty[0], process if alone else None, guilty[1], share, len(slow), extra_ns)


def path_times(trace: Trace) -> dict[Call, Counter[str]]:
    """Nanoseconds on a trace's critical path by service and name of a span, and therein by process."""
    times: dict[Call, Counter[str]] = {}
    for segment in trace.critical_path():
        process = segment.span.process
        call = (process.partition("/")[0], segment.span.name)
        times.setdefault(call, Counter())[process] += segment.duration_ns
    return times
