"""Blocks found by their whole past: what a hash chain and a radix tree have in common.

    tokens of A   [ a b │ c d │ e f ]        A and B share two blocks, C shares none: its first block differs,
    tokens of B   [ a b │ c d │ g h ]        so no later block of C is one of A's, though the tokens are alike
    tokens of C   [ x b │ c d │ e f ]

A position stands for all blocks from the first one to a certain depth. A caller goes down block by block, so a sequence
that has grown looks up what is new and nothing else. What a block stands for is a value: a frame that holds a page, a
layer of an image. The owner of the values counts who uses them; a block leaves when nobody does and nothing continues
it, so that what is held is always whole from the first block on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from minilib.mechanisms.caching import EvictionPolicy

Tokens = bytes | tuple[int, ...]  # what a block holds


class Match(NamedTuple):
    """The longest prefix that is held.

    Args:
        positions: the one before the first block, and then those behind each block that is held.
    """

    positions: list[Any]

    @property
    def values(self) -> list[Any]:
        """What its blocks stand for, from the first one on."""
        return [position.value for position in self.positions[1:]]

    @property
    def position(self) -> Any:
        """Behind the last of its blocks."""
        return self.positions[-1]


class PrefixIndex(ABC):
    """Values of blocks, by salt and by all blocks up to them.

    Args:
        policy: chooses which block leaves; it belongs to this index alone.

    Attributes:
        evictions: blocks that `evict` has given up.

    Raises:
        TypeError: if the policy is none.
        ValueError: if the policy has another owner.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        if not isinstance(policy, EvictionPolicy):
            raise TypeError(f"an EvictionPolicy such as Lru() is needed, got {policy!r}")
        policy.own("index")
        self.policy = policy
        self.evictions = 0

    @abstractmethod
    def __len__(self) -> int:
        """Blocks held."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The values of the blocks that are held."""

    @abstractmethod
    def paths(self) -> Iterator[tuple[Hashable, ...]]:
        """Every block that is held, as (salt, first block, …, the block itself)."""

    @abstractmethod
    def begin(self, salt: str = "") -> Any:
        """The position before the first block, depth 0; blocks under different salts are different."""

    @abstractmethod
    def find(self, position: Any, tokens: Tokens) -> Any | None:
        """The position one block further, None if that block is not held. It counts as no use."""

    @abstractmethod
    def add(self, position: Any, tokens: Tokens, value: Any) -> Any:
        """Hold a block, if it is not held already.

        Returns:
            Its position, with the value that is held for it: the given one, or that which came first. The position is
            not `listed` if the block could not be held: then nobody finds it, nor what continues it, and its value
            stays the caller's alone.
        """

    @abstractmethod
    def use(self, position: Any) -> None:
        """Tell the policy that the blocks up to here were used, the last one first: it leaves first, too."""

    @abstractmethod
    def renew(self, position: Any) -> None:
        """Tell the policy that the blocks up to here were in use until now, the last one first; it counts as no use.

        For whoever has held blocks for long: they are as old as the end of that, and not as its beginning.
        """

    @abstractmethod
    def evict(self, in_use: Callable[[Any], bool]) -> Any:
        """Give up one block that nothing continues and whose value is not in use.

        Args:
            in_use: value → whether it must stay; so each block has a value of its own. A value in use means that those
                before it are in use as well.

        Returns:
            Its value.

        Raises:
            NothingToEvict: if every block must stay.
        """

    @abstractmethod
    def discard(self, position: Any, in_use: Callable[[Any], bool]) -> list[Any]:
        """Give up the blocks up to here, the last one first, until one is continued or its value is in use.

        Returns:
            Their values.
        """

    def match(self, blocks: Iterable[Tokens], salt: str = "") -> Match:
        """The longest prefix of these blocks that is held; nothing is changed, and it counts as no use."""
        return self.extend(Match([self.begin(salt)]), blocks)

    def still_held(self, match: Match) -> Match:
        """What an earlier match has found and is sure to be held still; an index that cannot tell keeps nothing."""
        return Match(match.positions[:1])

    def extend(self, match: Match, blocks: Iterable[Tokens]) -> Match:
        """The longest prefix that is held, behind what was found and is held still.

        Args:
            match: found before.
            blocks: those that follow it.
        """
        positions = list(match.positions)
        for tokens in blocks:
            deeper = self.find(positions[-1], tokens)
            if deeper is None:
                break
            positions.append(deeper)
        return Match(positions)

    def check_invariants(self) -> None:
        """The policy holds what it should, and blocks are counted right."""
        self.policy.check_invariants()
        held = sum(1 for _ in self)
        assert held == len(self), f"{len(self)} blocks are counted, {held} are held"
