"""Time calls on all ranks in turns, A B B A …, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

Name = TypeVar("Name")


def seconds_in_turns(
    calls: Mapping[Name, Callable[[], object]],
    *,
    turns: int = 5,
    repeats: int = 1,
    warm_up: int = 1,
    budget: float = 0.0,
) -> dict[Name, list[float]]:
    """Time calls on all ranks; a collective: every rank calls it with the same names in the same order.

    All ranks begin a call together, after a barrier. Every second turn runs through the calls backwards.

    Args:
        calls: functions by name, called without arguments.
        turns: least number of turns that count.
        repeats: how often a function is called in a turn, without a barrier in between.
        warm_up: number of turns before those that count.
        budget: seconds; turns are added until rank 0 has spent as many.

    Returns:
        For each name and turn, seconds per call on the slowest rank; the same on every rank.

    Raises:
        ValueError: if there are no calls, `turns` or `repeats` is below 1, or `warm_up` is negative.
    """
    if not calls:
        raise ValueError("nothing to time: calls is empty")
    if turns < 1 or repeats < 1 or warm_up < 0:
        raise ValueError(f"needs turns ≥ 1, repeats ≥ 1, warm_up ≥ 0; got {turns=}, {repeats=}, {warm_up=}")
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    started, turn, more = time.perf_counter(), 0, [True]
    while more[0]:
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            samples[name].append(_seconds(calls[name], repeats))
        turn += 1
        more = [turn < warm_up + turns or time.perf_counter() - started < budget]
        dist.broadcast_object_list(more, 0)
    counted = [taken[warm_up:] for taken in samples.values()]
    ranks: list[list[list[float]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, counted)
    slowest = [[max(times) for times in zip(*taken, strict=True)] for taken in zip(*ranks, strict=True)]
    return dict(zip(calls, slowest, strict=True))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats
