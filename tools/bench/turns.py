"""What ranks measured in turns, as one sample a turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")


def slowest(ranks: Sequence[Mapping[Name, Sequence[float]]]) -> dict[Name, list[float]]:
    """For everything that took turns, the seconds of each turn on the rank that took longest."""
    return {name: slowest_turns(rank[name] for rank in ranks) for name in ranks[0]}


def slowest_turns(ranks: Iterable[Sequence[float]]) -> list[float]:
    """The same for one thing alone."""
    return [max(times) for times in zip(*ranks, strict=True)]
