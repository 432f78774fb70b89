"""Balancing by key: a key goes where it went before, to the target that still has what it needs for it.

    sticky      the target with the largest affinity, always: as skewed as the keys are
    bounded     the owner on a hash ring; if that is full, the next one on the ring

A third policy moves keys away from busy targets by biases: Feedback (policies.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from minilib.mechanisms.balancing.policies import Affinity, Feedback, Heedless, up_among
from minilib.mechanisms.sharding import ConsistentHashPartitioner, Key, stable_hash


def hash_affinity(num_targets: int) -> Callable[[Key], tuple[float, ...]]:
    """Scores of a key that has none of its own, for Sticky and Feedback.

    Args:
        num_targets: 1 or more.

    Returns:
        key → for each target a score in [0, 1) that looks random and is the same for ever.

    Raises:
        ValueError: if there is no target.

    Cost: num_targets hashes a key; the last 4096 keys are remembered.

    Source: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM ToN 1998 (rendezvous).
    """
    if num_targets < 1:
        raise ValueError(f"num_targets must be at least 1, got {num_targets!r}")

    @lru_cache(4096, typed=True)
    def scores(key: Key) -> tuple[float, ...]:
        place = stable_hash(key)
        return tuple((stable_hash(f"{target}/{place}") >> 11) / 2**53 for target in range(num_targets))

    return scores


class Sticky(Feedback):
    """A key always goes to the target that it has the largest affinity for, however much is there already.

    Args:
        num_targets: 1 or more.
        affinity: as of Feedback; by default a hash of the key.
    """

    def __init__(self, num_targets: int, affinity: Affinity | None = None) -> None:
        super().__init__(num_targets, rate=0.0, affinity=affinity or hash_affinity(num_targets))


class BoundedHashing(Heedless):
    """Consistent hashing with bounded loads: a key's owner on the ring, or the next one that has room.

    No target is given more than ⌈c · total / n⌉, where total counts this request and n the targets that are up.

    Args:
        num_targets: 1 or more.
        c: the bound over the mean load, above 1; near 1 is even, large is sticky.
        virtual_nodes: points a target on the ring.

    Raises:
        ValueError: if c is not above 1, or an argument is none for ConsistentHashPartitioner.

    Cost: O(n), and n · virtual_nodes hashes to build. A change of the targets moves O(1/(c-1)²) keys for each one that
    it must.

    Source: Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018 (arXiv 2016).
    """

    def __init__(self, num_targets: int, c: float = 1.25, virtual_nodes: int = 64) -> None:
        if not 1 < c < math.inf:
            raise ValueError(f"c must be above 1, or somebody may find no room, got {c!r}")
        self.c, self.ring = c, ConsistentHashPartitioner(tuple(range(num_targets)), virtual_nodes)

    def capacity(self, loads: Sequence[float]) -> int:
        """What a target may have once the next request is placed."""
        up = up_among(loads, self.ring.num_shards)
        return math.ceil(self.c * (sum(loads[target] for target in up) + 1) / len(up))

    def choose(self, key: Key, loads: Sequence[float]) -> int:
        """The first on the key's way round the ring that is up and has room."""
        capacity = self.capacity(loads)
        # somebody has room: were all full, they would have more than there is
        return next(target for target in self.ring.successors(key) if loads[target] + 1 <= capacity)
