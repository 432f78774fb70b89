"""Eviction that survives a scan: many keys pass through once, and the keys that are used again and again stay.

    SIEVE      one queue, and a hand that new keys are never put behind

               hand
                ▼
        behind  │  ahead ─────────────────────► new keys
        used: kept, bit cleared    not used: evicted

    S3-FIFO    new keys ──► small (10 %) ──used twice──► main: a clock ──not used──► gone
                              └─not used──► gone, but the name stays ──came again──► main

Both keep queues in order of arrival, so that a hit moves nothing: it sets a bit or raises a small counter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import suppress

from minilib.mechanisms.caching.eviction import Clock, Evictable, EvictionPolicy, NothingToEvict, any_key

MAX_USES = 3  # two bits a key
PROMOTED = 2  # uses after which a new key of S3-FIFO moves to the main queue
SMALL_SHARE = 10  # one in ten keys may be new


class Sieve(EvictionPolicy):
    """Evict the first key not used since the hand passed; a key that is kept stays where it is, behind the hand.

    A clock puts a key that it keeps among the new ones, where the next turn of the hand meets it after them. Here new
    keys come ahead of the hand, so those that are used once leave before those that were kept are asked again.

    Cost: O(1) a use; a victim O(1) on average, and two turns of the hand at worst.

    Source: Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm
    for Web Caches", NSDI 2024, algorithm 1.
    """

    def __init__(self) -> None:
        # Together one queue from the oldest to the newest key, cut at the hand; the value is the bit.
        self._behind: OrderedDict[Hashable, bool] = OrderedDict()
        self._ahead: OrderedDict[Hashable, bool] = OrderedDict()

    def __iter__(self) -> Iterator[Hashable]:
        yield from self._behind
        yield from self._ahead

    def __len__(self) -> int:
        return len(self._behind) + len(self._ahead)

    def add(self, key: Hashable) -> None:
        assert key not in self._part_of(key), f"{key!r} was added twice"
        self._turn()
        self._ahead[key] = False

    def use(self, key: Hashable) -> None:
        part = self._part_of(key)
        assert key in part, f"{key!r} is used and not held"
        part[key] = True

    def remove(self, key: Hashable) -> None:
        del self._part_of(key)[key]

    def victim(self, evictable: Evictable = any_key) -> Hashable:
        for _ in range(2 * len(self)):  # the rest of a turn and one more clear every bit that may be cleared
            self._turn()
            key, used = next(iter(self._ahead.items()))
            if evictable(key):
                if not used:
                    return key
                used = False
            del self._ahead[key]
            self._behind[key] = used
        raise self._nothing()

    def _turn(self) -> None:
        """Bring a hand that has passed the newest key back to the oldest."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead

    def _part_of(self, key: Hashable) -> OrderedDict[Hashable, bool]:
        return self._behind if key in self._behind else self._ahead


class S3Fifo(EvictionPolicy):
    """Evict new keys that are not used soon; those that are, or that come back soon, join a clock nine times as large.

    Keys that were new when they were evicted are remembered by name, as many as the main queue holds in a full cache.
    Shares are counted in keys, and the cache is taken to be full when it asks for a victim.

    Cost: O(1) a use; a victim O(1) on average, one pass over the new keys and four turns of the clock at worst.

    Source: Yang, Zhang, Qiu, Yue and Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023, algorithm 1.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[Hashable, int] = OrderedDict()  # new key → its uses, the oldest first
        self._main = Clock(MAX_USES)
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()  # names of keys that left the small queue

    def __iter__(self) -> Iterator[Hashable]:
        yield from self._small
        yield from self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def add(self, key: Hashable) -> None:
        assert key not in self._small, f"{key!r} was added twice"
        if key in self._ghosts:
            del self._ghosts[key]
            self._main.add(key)
        else:
            self._small[key] = 0

    def use(self, key: Hashable) -> None:
        if key in self._small:
            self._small[key] = min(self._small[key] + 1, MAX_USES)
        else:
            self._main.use(key)

    def remove(self, key: Hashable) -> None:
        if key in self._small:
            del self._small[key]
        else:
            self._main.remove(key)

    def evict(self, key: Hashable) -> None:
        if key in self._small:
            self._ghosts[key] = None
            while len(self._ghosts) > len(self) - len(self) // SMALL_SHARE:
                self._ghosts.popitem(last=False)
        self.remove(key)

    def victim(self, evictable: Evictable = any_key) -> Hashable:
        choices = [self._main.victim, self._victim_of_small]
        if SMALL_SHARE * len(self._small) >= len(self):
            choices.reverse()
        for choice in choices:
            with suppress(NothingToEvict):
                return choice(evictable)
        raise self._nothing()

    def check_invariants(self) -> None:
        """Every key is held once, no counter has left its range, and no name is remembered of a key that is held."""
        super().check_invariants()
        self._main.check_invariants()
        assert all(0 <= uses <= MAX_USES for uses in self._small.values()), f"counters {self._small}"
        assert not self._ghosts.keys() & set(self), "a key is held and remembered as gone"

    def _victim_of_small(self, evictable: Evictable) -> Hashable:
        """The oldest new key that was not used enough; older ones that were move to the main queue."""
        promoted, victims = [], []
        for key, uses in self._small.items():
            if evictable(key):
                if uses < PROMOTED:
                    victims = [key]
                    break
                promoted.append(key)
        for key in promoted:
            del self._small[key]
            self._main.add(key)
        if victims:
            return victims[0]
        raise self._nothing()
