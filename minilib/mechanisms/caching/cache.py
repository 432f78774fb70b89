"""A bounded cache: entries with a size, a capacity for their sum, and an eviction policy that makes room.

    get   ──► hit or miss, counted                     pin   ──► the entry is in use and must not be evicted
    put   ──► evicts until the entry fits, counted     unpin ──► it may go, once nobody else has pinned it

Whoever loses an entry can compute it again, so a cache may forget at any time; what it must not do is to take an entry
from somebody who is reading it, or to hold more than it was given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from minilib.mechanisms.caching.eviction import EvictionPolicy


class DoesNotFit(MemoryError):
    """An entry has no place in the cache; nothing was changed."""


class EntryTooLarge(DoesNotFit):
    """The entry is larger than the whole cache."""


class NoRoom(DoesNotFit):
    """Entries in use leave too little room; it may fit once they are unpinned."""


class EntryInUse(RuntimeError):
    """A pinned entry was to be removed."""


class _Entry(NamedTuple):
    value: Any
    size: int


class Cache:
    """Values by key, whose sizes together never exceed a capacity.

    Args:
        capacity: the sum of sizes that it may hold: entries, bytes, pages. A cache of 0 holds entries of size 0 only.
        policy: chooses who leaves; it belongs to this cache alone.

    Attributes:
        hits, misses: calls of `get` that found the key, and that did not.
        evictions: entries that left because another one needed room.
        used: the sum of the sizes held.

    Raises:
        ValueError: if capacity is below 0, or the policy has another owner.

    Cost: O(1) for each call and each eviction, plus that of the policy, and O(pinned entries) to put.
    """

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        if capacity < 0:
            raise ValueError(f"a cache has a capacity of 0 or more, got {capacity!r}")
        policy.own("cache")
        self.capacity, self.policy = capacity, policy
        self.hits = self.misses = self.evictions = self.used = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._pins: Counter[Hashable] = Counter()

    def __contains__(self, key: Hashable) -> bool:
        """Whether a key is held; counts nothing, and is no use of it."""
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        """The keys held, in the order in which they came."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Entries held."""
        return len(self._entries)

    def get(self, key: Hashable, default: Any = None) -> Any:
        """The value of a key, which counts as a hit and as a use; or the default, which counts as a miss."""
        if key not in self._entries:
            self.misses += 1
            return default
        self.hits += 1
        self.policy.use(key)
        return self._entries[key].value

    def put(self, key: Hashable, value: Any, size: int = 1) -> dict[Hashable, Any]:
        """Hold a value, and evict others until it fits. A value that the key had is replaced, pinned or not.

        Args:
            key, value: what to hold.
            size: what the entry takes of the capacity.

        Returns:
            Values by key that were evicted, in that order.

        Raises:
            EntryTooLarge: if the entry is larger than the cache.
            NoRoom: if the entries in use leave too little room.
            TypeError, ValueError: if the size is no whole number of 0 or more.
        """
        self._check_room(key, size)
        if key in self._entries:
            self.policy.use(key)
            self.used -= self._entries[key].size
        evicted = {}
        while self.used + size > self.capacity:
            victim = self.policy.victim(lambda other: other != key and other not in self._pins)
            self.policy.evict(victim)
            evicted[victim] = self._drop(victim)
        if key not in self._entries:
            self.policy.add(key)
        self._entries[key] = _Entry(value, size)
        self.used += size
        self.evictions += len(evicted)
        return evicted

    def offer(self, key: Hashable, value: Any, size: int = 1) -> dict[Hashable, Any]:
        """As `put`; but if the entry has no place, it is not held, and neither is what the key had before.

        Returns:
            Values by key that were evicted.

        Raises:
            EntryInUse: if the entry has no place, and the key is pinned.
            TypeError, ValueError: as `put`.
        """
        try:
            return self.put(key, value, size)
        except DoesNotFit:
            if key in self._entries:
                self.remove(key)
            return {}

    def remove(self, key: Hashable) -> Any:
        """Give an entry up; no eviction is counted.

        Returns:
            Its value.

        Raises:
            KeyError: if the key is not held.
            EntryInUse: if it is pinned.
        """
        if key in self._pins:
            raise EntryInUse(f"{key!r} is pinned {self._pins[key]} times; unpin it before it is removed")
        self.policy.remove(key)
        return self._drop(key)

    def pin(self, key: Hashable) -> Any:
        """Keep an entry until `unpin` was called as often as `pin`; counts neither as a hit nor as a use.

        Returns:
            Its value.

        Raises:
            KeyError: if the key is not held.
        """
        value = self._entries[key].value
        self._pins[key] += 1
        return value

    def unpin(self, key: Hashable) -> None:
        """Take one pin away.

        Raises:
            ValueError: if the key is not pinned.
        """
        if key not in self._pins:
            raise ValueError(f"{key!r} is not pinned")
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def check_invariants(self) -> None:
        """What is held fits and is what the policy knows of, and what is pinned is held."""
        self.policy.check_invariants()
        assert set(self.policy) == self._entries.keys(), "the policy holds other keys than the cache"
        assert self.used == sum(entry.size for entry in self._entries.values()) <= self.capacity, f"{self.used} in use"
        assert self._pins.keys() <= self._entries.keys(), "a pinned entry is gone"
        assert all(count > 0 for count in self._pins.values()), f"pins {self._pins}"

    def _check_room(self, key: Hashable, size: int) -> None:
        if not isinstance(size, int):
            raise TypeError(f"a size is a whole number, got {size!r}")
        if size < 0:
            raise ValueError(f"a size is 0 or more, got {size}")
        if size > self.capacity:
            raise EntryTooLarge(f"{key!r} of size {size} is larger than the whole cache of {self.capacity}")
        in_use = sum(self._entries[other].size for other in self._pins if other != key)
        if in_use + size > self.capacity:
            raise NoRoom(f"{key!r} of size {size} and {in_use} in use are more than {self.capacity}; unpin some first")

    def _drop(self, key: Hashable) -> Any:
        entry = self._entries.pop(key)
        self.used -= entry.size
        return entry.value
