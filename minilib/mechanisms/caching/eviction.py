"""Eviction: which of the keys that are held leaves when room is needed.

    Fifo     came first                             learns nothing from a use
    Lru      used longest ago                       moves a key at every use
    Clock    not used since the hand passed         a bit, or a small counter, a key
    Lfu      used least often, by an aging count    a count a key
    Sieve    as Clock, but new keys and kept keys   a bit a key                        (scan_resistant.py)
             are not mixed
    S3Fifo   not used again while it was new        a counter a key, and old names     (scan_resistant.py)

A policy holds keys, not what they stand for, and never looks into them: they are frames of memory, sessions of a
server, or pages of a prefix tree. It chooses among those that its owner allows: all but pinned ones, or only leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

Evictable = Callable[[Hashable], bool]


class NothingToEvict(LookupError):
    """No key is held, or none of those that are held may leave."""


def any_key(key: Hashable) -> bool:
    """Every key may leave."""
    return True


class EvictionPolicy(ABC):
    """Keeps the order in which keys leave. The owner adds a key once, then uses it, and evicts or removes it once."""

    _owned = False

    def own(self, owner: str) -> None:
        """Whoever adds keys claims the policy first, since two owners would be given each other's keys to evict.

        Args:
            owner: what it is, for the message.

        Raises:
            ValueError: if somebody else has claimed it, or has added keys.
        """
        if self._owned or len(self):
            keys = f"{len(self)} keys of another"
            raise ValueError(f"a policy serves one {owner}, and this one holds {keys}; make a new one")
        self._owned = True

    @abstractmethod
    def __iter__(self) -> Iterator[Hashable]:
        """The keys that are held."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys are held."""

    @abstractmethod
    def add(self, key: Hashable) -> None:
        """A key came in."""

    @abstractmethod
    def use(self, key: Hashable) -> None:
        """A key that is held was used again."""

    def renew(self, key: Hashable) -> None:
        """A key that is held was in use until now, by whoever brought it in or used it: no further use, and not old.

        Orders that do not ask when a key was used last have nothing to note.
        """
        return

    @abstractmethod
    def remove(self, key: Hashable) -> None:
        """A key left because its owner gave it up, and nothing is remembered of it.

        Raises:
            KeyError: if the key is not held.
        """

    def evict(self, key: Hashable) -> None:
        """A key left because `victim` chose it: as `remove`, but a policy may remember its name.

        Raises:
            KeyError: if the key is not held.
        """
        self.remove(key)

    @abstractmethod
    def victim(self, evictable: Evictable = any_key) -> Hashable:
        """Choose the key that leaves next; `evict` or `remove` follows once its content is safe.

        Hands move and counters fall on the way. A key that may not leave is passed by, and keeps what it has earned.

        Args:
            evictable: key → whether it may leave.

        Raises:
            NothingToEvict: if no key may.
        """

    def check_invariants(self) -> None:
        """Every key is held once."""
        keys = list(self)
        assert len(keys) == len(set(keys)) == len(self), f"{len(self)} keys are counted, {len(keys)} are held"

    def _nothing(self) -> NothingToEvict:
        return NothingToEvict(f"none of the {len(self)} keys that are held may leave; unpin one, or remove it")


class Fifo(EvictionPolicy):
    """Evict the key that came first. Simple, but more room can mean fewer hits (Belady 1969).

    Cost: O(1), and O(1) for each older key that may not leave.

    Source: Belady, Nelson and Shedler, "An anomaly in space-time characteristics of certain programs running in a
    paging machine", CACM 1969.
    """

    def __init__(self) -> None:
        # The next to leave comes first; the value is its uses, which the orders that look at them count.
        self._queue: OrderedDict[Hashable, int] = OrderedDict()

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, key: Hashable) -> None:
        assert key not in self._queue, f"{key!r} was added twice"
        self._queue[key] = 0

    def use(self, key: Hashable) -> None:
        assert key in self._queue, f"{key!r} is used and not held"

    def remove(self, key: Hashable) -> None:
        del self._queue[key]

    def victim(self, evictable: Evictable = any_key) -> Hashable:
        for key in self._queue:
            if evictable(key):
                return key
        raise self._nothing()


class Lru(Fifo):
    """Evict the key used longest ago. The order must be told of every use, which hardware does not report.

    Cost: as Fifo. Where a key may not leave before others (a prefix before what continues it), use those others first:
    they are older then, and are found at once.
    """

    def use(self, key: Hashable) -> None:
        self._queue.move_to_end(key)

    renew = use


class Clock(Fifo):
    """Evict the first key not used since the hand last passed. Takes one bit a key, which an MMU sets itself.

    With a counter instead of the bit a key that was used often survives several turns of the hand.

    Args:
        max_uses: where the counter of a key stops; 1 is the bit of the textbook.

    Raises:
        ValueError: if max_uses is below 1.

    Cost: O(1) a use; a victim O(1) on average, max_uses + 1 turns of the hand at worst.

    Source: Corbató, "A paging experiment with the Multics system", 1968.
    """

    def __init__(self, max_uses: int = 1) -> None:
        if max_uses < 1:
            raise ValueError(f"a counter of uses goes to 1 at least, got {max_uses!r}")
        super().__init__()
        self.max_uses = max_uses

    def use(self, key: Hashable) -> None:
        self._queue[key] = min(self._queue[key] + 1, self.max_uses)

    def victim(self, evictable: Evictable = any_key) -> Hashable:
        for _ in range((self.max_uses + 1) * len(self)):
            key, uses = next(iter(self._queue.items()))
            if evictable(key):
                if not uses:
                    return key
                self._queue[key] = uses - 1
            self._queue.move_to_end(key)  # the hand passes on
        raise self._nothing()

    def check_invariants(self) -> None:
        """Every key is held once, and no counter has left its range."""
        super().check_invariants()
        assert all(0 <= uses <= self.max_uses for uses in self._queue.values()), f"counters {self._queue}"


class Lfu(EvictionPolicy):
    """Evict the key with the lowest priority: its uses, plus the age of the cache when it was last used.

    The age is the priority of the last victim. So a new key need not catch up with all that another has earned in the
    past, and a key that was hot long ago leaves at last. Among equals the one that was used longest ago leaves.

    Cost: O(1) a use; a victim O(p log p) for p different priorities, and O(1) for each key that may not leave.

    Source: Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating Content Management Techniques for Web Proxy
    Caches", Performance Evaluation Review 2000 (LFU with dynamic aging).
    """

    def __init__(self) -> None:
        self.age = 0
        self._uses: dict[Hashable, int] = {}
        self._priority: dict[Hashable, int] = {}
        self._ranks: dict[int, OrderedDict[Hashable, None]] = {}  # priority → its keys, the one used longest ago first

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._uses)

    def __len__(self) -> int:
        return len(self._uses)

    def add(self, key: Hashable) -> None:
        assert key not in self._uses, f"{key!r} was added twice"
        self._rank(key, uses=1)

    def use(self, key: Hashable) -> None:
        uses = self._uses[key]
        self.remove(key)
        self._rank(key, uses + 1)

    def renew(self, key: Hashable) -> None:
        self._ranks[self._priority[key]].move_to_end(key)

    def remove(self, key: Hashable) -> None:
        del self._uses[key]
        priority = self._priority.pop(key)
        del self._ranks[priority][key]
        if not self._ranks[priority]:
            del self._ranks[priority]

    def victim(self, evictable: Evictable = any_key) -> Hashable:
        for priority in sorted(self._ranks):
            for key in self._ranks[priority]:
                if evictable(key):
                    self.age = max(self.age, priority)
                    return key
        raise self._nothing()

    def check_invariants(self) -> None:
        """Every key is held once, at its priority, which its uses and the age have given it."""
        super().check_invariants()
        ranked = {key: priority for priority, keys in self._ranks.items() for key in keys}
        assert ranked == self._priority and all(self._ranks.values()), "a key is at a priority that is not its own"
        assert self._priority.keys() == self._uses.keys()
        for key, uses in self._uses.items():
            assert uses <= self._priority[key] <= uses + self.age, f"{key!r}: {uses} uses, {self._priority[key]}"

    def _rank(self, key: Hashable, uses: int) -> None:
        self._uses[key], self._priority[key] = uses, uses + self.age
        self._ranks.setdefault(uses + self.age, OrderedDict())[key] = None
