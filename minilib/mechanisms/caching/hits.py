"""Hits of a trace: those of a cache, and the most that any policy could have."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from heapq import heappop, heappush

from minilib.mechanisms.caching.cache import Cache


def count_hits(trace: Iterable[Hashable], cache: Cache) -> int:
    """Ask a cache for each key of a trace in turn, and put those that it misses, each of size 1; returns the hits."""
    before = cache.hits
    for key in trace:
        if cache.get(key) is None:
            cache.offer(key, True)
    return cache.hits - before


def belady_hits(trace: Iterable[Hashable], capacity: int) -> int:
    """The most hits of any policy that holds each key it is asked for, in a cache that starts empty.

    Evicts the key whose next use is farthest away, which takes knowledge of the future. A cache that may also decline
    to hold a key can have more hits; sizes that differ make the optimum NP-hard, so every entry counts 1.

    Args:
        trace: the keys asked for, in order.
        capacity: entries that the cache holds.

    Raises:
        ValueError: if capacity is below 0.

    Cost: O(n log n) for n requests.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966 (MIN).
    """
    if capacity < 0:
        raise ValueError(f"a cache has a capacity of 0 or more, got {capacity!r}")
    trace = list(trace)
    held: set[Hashable] = set()
    farthest: list[tuple[float, int]] = []  # (-next use, a request for that key); out of date ones sort last
    hits = 0
    for now, next_use in enumerate(_next_uses(trace) if capacity else ()):
        key = trace[now]
        if key in held:
            hits += 1
        elif len(held) == capacity:
            held.remove(trace[heappop(farthest)[1]])
        held.add(key)
        heappush(farthest, (-next_use, now))
    return hits


def _next_uses(trace: list[Hashable]) -> list[float]:
    """For each request the number of the next one for the same key, math.inf if there is none."""
    following: dict[Hashable, int] = {}
    next_uses = [math.inf] * len(trace)
    for now in range(len(trace) - 1, -1, -1):
        next_uses[now] = following.get(trace[now], math.inf)
        following[trace[now]] = now
    return next_uses
