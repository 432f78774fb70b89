"""Sharding: a partitioner says which shard owns a key, and how even that is is counted.

    range        a ── shard 0 ── g ── shard 1 ── p ── shard 2 ──►     near keys together: cheap scans, hot spots
    hash         shard = hash(key) mod n                              even, but another n moves nearly everything
    consistent   ··1··0··2··0··1··2··►  (a ring of points)            about even, and another n moves what it must

One protocol serves the rows of a database (sqlite_shards.py), the samples of a corpus that are dealt to data-parallel
ranks (training/sampler.py) and, as slices of one flat row (slicing.py), the state that ZeRO's ranks own. What a change
of partitioner costs is in resharding.py.

Sources: Karger et al., "Consistent Hashing and Random Trees", STOC 1997; DeCandia et al., "Dynamo", SOSP 2007, section
4.2 (virtual nodes).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from minilib.mechanisms.sharding.slicing import slices

Key = int | str | bytes


class UnusableKey(TypeError):
    """A key that this partitioner cannot place; the message says which it could."""


class Partitioner(Protocol):
    """Who owns what. Equal partitioners have equal reprs, and decide alike in every process and on every machine."""

    @property
    def shards(self) -> Sequence[int]:
        """Numbers of the shards, ascending."""

    @property
    def num_shards(self) -> int:
        """How many there are."""

    def owner(self, key: Key) -> int:
        """The one shard that owns a key.

        Raises:
            UnusableKey: if the key is of a type that it cannot place.
        """


def kind(key: Key) -> type:
    """int, str or bytes: which of them a key is.

    Raises:
        UnusableKey: if it is none; a NumPy integer is none, since sqlite3 would store its bytes.
    """
    for known in (int, str, bytes):
        if isinstance(key, known):
            return known
    raise UnusableKey(f"a key is an int, str or bytes, got {key!r} of type {type(key).__name__}; convert it first")


def stable_hash(key: Key) -> int:
    """64 bits that depend on the key alone. Python's own hash() of a str is salted afresh in every process.

    Raises:
        UnusableKey: if the key is no int, str or bytes.
    """
    known = kind(key)
    if known is int:
        content = b"%x" % key
    elif known is str:
        content = key.encode("utf-8", "surrogatepass")
    else:
        content = key
    # the type is hashed as well, so that 1, "1" and b"1" are three keys
    return int.from_bytes(blake2b(content, digest_size=8, person=known.__name__.encode()).digest(), "big")


class _Numbered:
    """Shards without names of their own: 0 to num_shards - 1."""

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(self.num_shards)


@dataclass(frozen=True)
class RangePartitioner(_Numbered):
    """Neighbouring keys together.

    Args:
        boundaries: ascending; shard i owns the keys k with boundaries[i - 1] ≤ k < boundaries[i], the first shard all
            below and the last all from there on. Two equal ones make a shard that owns nothing.

    Raises:
        UnusableKey: if boundaries are not all ints, all strs or all bytes.
        ValueError: if they descend.

    Cost: log₂(num_shards) comparisons a key.
    """

    boundaries: tuple[Key, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        kinds = {kind(boundary) for boundary in self.boundaries}
        if len(kinds) > 1:
            raise UnusableKey(f"boundaries are of one type, got {sorted(known.__name__ for known in kinds)}")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ValueError(f"boundaries ascend, got {self.boundaries}; sort them")

    @classmethod
    def even(cls, num_keys: int, num_shards: int, *, padded: bool = False) -> RangePartitioner:
        """Cut the keys 0 to num_keys - 1 into contiguous shares.

        Args:
            num_keys: 0 or more.
            num_shards: 1 or more.
            padded: False for sizes that differ by at most 1, the larger ones first; True for shares of
                ⌈num_keys / num_shards⌉ until the keys run out, which padding makes equal: those of `slices`.

        Raises:
            ValueError: if there are fewer keys than 0 or fewer shards than 1.
        """
        if num_keys < 0 or num_shards < 1:
            raise ValueError(f"num_keys must be at least 0 and num_shards at least 1, got {num_keys} and {num_shards}")
        if padded:
            return cls(tuple(start for start, _ in slices(num_keys, num_shards)[1:]))
        size, larger = divmod(num_keys, num_shards)
        return cls(tuple(shard * size + min(shard, larger) for shard in range(1, num_shards)))

    @property
    def num_shards(self) -> int:
        """One more than boundaries."""
        return len(self.boundaries) + 1

    def owner(self, key: Key) -> int:
        """The shard between whose boundaries the key lies."""
        known = kind(key)
        if self.boundaries and known is not kind(self.boundaries[0]):
            expected = kind(self.boundaries[0]).__name__
            raise UnusableKey(f"the boundaries are of type {expected}, and {key!r} cannot be compared with them")
        return bisect_right(self.boundaries, key)

    def span(self, shard: int) -> slice:
        """The keys of a shard, first to one past the last, None for an open end: what slices a list of all keys.

        Raises:
            IndexError: if there is no such shard.
        """
        if shard not in self.shards:
            raise IndexError(f"shard {shard} is none of the {self.num_shards} shards from 0")
        ends = (None, *self.boundaries, None)
        return slice(ends[shard], ends[shard + 1])


@dataclass(frozen=True)
class HashPartitioner(_Numbered):
    """A stable hash modulo the number of shards.

    Args:
        num_shards: 1 or more.

    Raises:
        ValueError: if there are fewer.

    Cost: one hash a key.
    """

    num_shards: int

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ValueError(f"num_shards must be at least 1, got {self.num_shards!r}")

    def owner(self, key: Key) -> int:
        """The remainder of the key's hash."""
        return stable_hash(key) % self.num_shards


@dataclass(frozen=True)
class ConsistentHashPartitioner:
    """Every shard has points on a ring; a key belongs to the first point after its own place.

    Args:
        shards: numbers, each once; a shard keeps its number when others come and go.
        virtual_nodes: points a shard. A shard's share of the keys strays from the mean by a standard deviation of
            √((n-1) / (n·v+1)), about 1/√v of the mean, for n shards of v points.

    Raises:
        ValueError: if there is no shard, a shard twice, or no point.

    Cost: one hash a key and log₂(n·v) comparisons; n·v hashes to build.
    """

    shards: tuple[int, ...]
    virtual_nodes: int = 64
    _places: list[int] = field(init=False, repr=False, compare=False)
    _owners: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shards = tuple(sorted(self.shards))
        if not shards or len(set(shards)) < len(shards):
            raise ValueError(f"a ring needs one shard or more, each once, got {shards}")
        if self.virtual_nodes < 1:
            raise ValueError(f"virtual_nodes must be at least 1, got {self.virtual_nodes!r}")
        points = sorted((stable_hash(f"{shard}/{v}"), shard) for shard in shards for v in range(self.virtual_nodes))
        object.__setattr__(self, "shards", shards)
        object.__setattr__(self, "_places", [place for place, _ in points])
        object.__setattr__(self, "_owners", [shard for _, shard in points])

    @property
    def num_shards(self) -> int:
        """How many there are."""
        return len(self.shards)

    def owner(self, key: Key) -> int:
        """The shard whose point comes next on the ring."""
        return self._owners[bisect_right(self._places, stable_hash(key)) % len(self._owners)]

    def successors(self, key: Key) -> Iterator[int]:
        """Every shard once, in the order in which their points follow a key's place: first its owner, then who is next.

        Source: DeCandia et al., "Dynamo", SOSP 2007, section 4.3 (the preference list).
        """
        start, met = bisect_right(self._places, stable_hash(key)), set()
        for step in range(len(self._owners)):
            shard = self._owners[(start + step) % len(self._owners)]
            if shard not in met:
                met.add(shard)
                yield shard
            if len(met) == len(self.shards):
                return

    def with_shard(self, shard: int) -> ConsistentHashPartitioner:
        """A ring with one shard more: keys move to it, and nowhere else."""
        return ConsistentHashPartitioner((*self.shards, shard), self.virtual_nodes)

    def without_shard(self, shard: int) -> ConsistentHashPartitioner:
        """A ring with one shard less: its keys move, and no others.

        Raises:
            ValueError: if the shard is not on the ring, or is the last one.
        """
        if shard not in self.shards:
            raise ValueError(f"shard {shard} is not on this ring of {self.shards}")
        return ConsistentHashPartitioner(tuple(s for s in self.shards if s != shard), self.virtual_nodes)


def loads(partitioner: Partitioner, keys: Iterable[Key]) -> dict[int, int]:
    """Keys that each shard owns, those without any included."""
    counts = Counter(map(partitioner.owner, keys))
    return {shard: counts[shard] for shard in partitioner.shards}


def imbalance(counts: Collection[int]) -> float:
    """The largest load over the mean load: 1.0 is even, and n means that one of n shards has it all.

    Args:
        counts: load of each shard, such as loads(...).values(); without any load at all they are even.

    Raises:
        ValueError: if there is no shard.
    """
    if not counts:
        raise ValueError("imbalance needs the load of one shard or more, got none")
    return max(counts) * len(counts) / sum(counts) if sum(counts) else 1.0
