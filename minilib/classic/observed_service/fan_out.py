"""A request that waits for all of its leaves is as slow as the slowest of them: what is rare in one is common in many.

    one leaf in 100 is slow      of 1 leaf: 1 % of requests      of 100 leaves: 63 %

A step of synchronous training is such a request. Its ranks are the leaves, and it is the only one at a time.

Source: Dean and Barroso, "The tail at scale", CACM 2013.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from minilib.mechanisms.telemetry import Trace


def slow_at_root(slow_leaf: float, leaves: int) -> float:
    """Share of requests that wait for a slow leaf, 1 − (1 − p)ⁿ, if leaves are slow independently.

    Args:
        slow_leaf: share p of leaves that are slow, 0 to 1.
        leaves: number n of leaves that each request waits for.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not 0 <= slow_leaf <= 1 or leaves < 0:
        raise ValueError(f"a share is between 0 and 1, leaves are 0 or more, got {slow_leaf!r} and {leaves!r}")
    return -math.expm1(leaves * math.log1p(-slow_leaf)) if slow_leaf < 1 else float(leaves > 0)


def leaf_for_root(slow_root: float, leaves: int) -> float:
    """Share of leaves that may be slow if no more than a share of requests are to wait for one; the inverse.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not 0 <= slow_root < 1 or leaves < 1:
        raise ValueError(f"a share is 0 or more and below 1, leaves are 1 or more, got {slow_root!r} and {leaves!r}")
    return -math.expm1(math.log1p(-slow_root) / leaves)


def slow_shares(traces: Sequence[Trace], leaf: str, slow_ns: float) -> tuple[float, float]:
    """Share of leaves that were slow, and share of requests that had a slow leaf or more, as traces show them.

    Args:
        traces: one for each request.
        leaf: name of a leaf's span.
        slow_ns: duration in ns above which a leaf is slow.

    Raises:
        ValueError: if there is no such leaf.
    """
    slow = [[span.duration_ns > slow_ns for span in trace.spans if span.name == leaf] for trace in traces]
    leaves = sum(map(len, slow))
    if not leaves:
        raise ValueError(f"no span is named {leaf!r}")
    return sum(map(sum, slow)) / leaves, sum(map(any, slow)) / len(slow)
