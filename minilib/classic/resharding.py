"""Resharding: which keys move when another partitioner takes over, counted, and how many to expect.

    from n to n+1 shards     modulo n/(n+1)     even ranges 1/2     consistent hashing 1/(n+1)

Source: Karger et al., "Consistent Hashing and Random Trees", STOC 1997, for the last of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from minilib.mechanisms.sharding import Key, Partitioner


@dataclass(frozen=True)
class Moves:
    """What a change of partitioner moves.

    Args:
        counts: (from shard, to shard) → keys, only where something moves.
        num_keys: keys in all, those that stay included.
    """

    counts: dict[tuple[int, int], int]
    num_keys: int

    @property
    def moved(self) -> int:
        """Keys that change their shard."""
        return sum(self.counts.values())

    @property
    def fraction(self) -> float:
        """Share of the keys that change their shard, 0 to 1."""
        return self.moved / self.num_keys if self.num_keys else 0.0


def moves(old: Partitioner, new: Partitioner, keys: Iterable[Key]) -> Moves:
    """Count which keys go from where to where when `new` takes over from `old`."""
    pairs = Counter((old.owner(key), new.owner(key)) for key in keys)
    return Moves({pair: pairs[pair] for pair in sorted(pairs) if pair[0] != pair[1]}, pairs.total())


def expected_moved(scheme: str, old: int, new: int) -> Fraction:
    """Share of many evenly spread keys that a change from `old` to `new` shards moves.

        modulo       1 - min(n, m) / lcm(n, m)        n → n+1:  n / (n+1)
        range        1 - Σ overlap of share i         n → n+1:  1/2
        consistent   1 - min(n, m) / max(n, m)        n → n+1:  1 / (n+1), and no scheme that stays even moves less

    Args:
        scheme: "modulo" (HashPartitioner), "range" (RangePartitioner.even) or "consistent" (a ring that keeps the
            shards that it can); for that one it is the mean over rings.
        old, new: numbers of shards, 1 or more.

    Raises:
        ValueError: if the scheme is unknown or a number is below 1.
    """
    if min(old, new) < 1:
        raise ValueError(f"there is at least 1 shard before and after, got {old} and {new}")
    few, many = sorted((old, new))
    if scheme == "modulo":
        return 1 - Fraction(few, math.lcm(old, new))
    if scheme == "consistent":
        return 1 - Fraction(few, many)
    if scheme == "range":
        return 1 - sum(max(Fraction(0), Fraction(i + 1, many) - Fraction(i, few)) for i in range(few))
    raise ValueError(f"scheme is 'modulo', 'range' or 'consistent', got {scheme!r}")
