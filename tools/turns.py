"""What ranks measured in turns, as one sample a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")


def slowest(ranks: Sequence[Mapping[Name, Sequence[float]]]) -> dict[Name, list[float]]:
    """For everything that took turns, the seconds of each turn on the rank that took longest."""
    return {name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}
