"""The open loop of experiment.py without HTTP: the price of it, to hold against the run."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from minilib.classic.http.load import Answer, Report, arrivals_at, works_of
from minilib.classic.http.proxy import BackendHealth
from minilib.mechanisms.balancing import Policy


def simulate_experiment(
    policy: Policy,
    speeds: Sequence[float],
    keys: Sequence[str],
    *,
    work: float | Sequence[float] = 0.005,
    utilization: float = 0.8,
    seed: int = 0,
    window: int = 64,
) -> Report:
    """What `run_experiment` would report of an open loop if HTTP and the event loop cost nothing: a price of it.

    The same requests arrive at the same times, and no clock is read, so the same arguments report the same.

    Args:
        policy, speeds, keys, work, utilization, seed, window: as of run_experiment.

    Raises:
        ValueError: as run_experiment.
    """
    works = works_of(work, keys, speeds)
    free_at, health = [0.0] * len(speeds), [BackendHealth() for _ in speeds]
    leaving: list[tuple[float, int]] = []  # a heap: when, from which backend
    answers, before = [], [0] * len(speeds)
    for key, each, now in zip(keys, works, arrivals_at(utilization, works, speeds, seed), strict=True):
        while leaving and leaving[0][0] <= now:
            health[heappop(leaving)[1]].in_flight -= 1
        target = policy.choose(key, [backend.in_flight for backend in health])
        start, service = max(now, free_at[target]), each / speeds[target]
        free_at[target] = start + service
        heappush(leaving, (free_at[target], target))
        health[target].in_flight += 1
        health[target].forwarded += 1
        answers.append(Answer(key, 200, target, free_at[target] - now, start - now, service))
        if len(answers) % window == 0:
            counts = [backend.forwarded for backend in health]
            policy.observe([count - then for count, then in zip(counts, before, strict=True)])
            before = counts
    for _, target in leaving:
        health[target].in_flight -= 1
    return Report(tuple(answers), max(free_at), 0, tuple(health))
