"""A hash chain: the name of a block is a digest of its content and of the name of the block before it.

    ORIGIN ─┬─ H(ORIGIN, block 0, salt) = key 0 ─── H(key 0, block 1) = key 1 ─── H(key 1, block 2) = key 2
            └─ …

Equal keys mean an equal past, so one dictionary finds any prefix, on any machine that hashes alike. Commits of git and
layers of container images are named so; vLLM names pages of keys and values so.

Sources: Merkle, "A Digital Signature Based on a Conventional Encryption Function", CRYPTO 1987; vLLM, "Automatic Prefix
Caching" (design document).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minilib.mechanisms.caching import EvictionPolicy
from minilib.mechanisms.content_addressing.index import Match, PrefixIndex, Tokens

ORIGIN = bytes(32)  # where every chain begins


def block_key(parent: bytes, tokens: Tokens, extras: Iterable[tuple[str, str]] = ()) -> bytes:
    """The SHA-256 of all that a block depends on; each part is written with its length, so that none runs into another.

    Args:
        parent: key of the block before, ORIGIN for the first one.
        tokens: what the block holds: bytes, or token ids below 2⁶³.
        extras: whatever else makes a block another one, as (kind, value): a salt, the name of an adapter.

    Cost: 1 hash over 32 + 8 · tokens bytes, or 32 + bytes.
    """
    raw = isinstance(tokens, bytes)
    content = tokens if raw else struct.pack(f"<{len(tokens)}q", *tokens)
    parts = [parent, struct.pack("<?q", raw, len(content)), content]
    for extra in extras:
        for text in extra:
            encoded = text.encode("utf-8", "surrogatepass")
            parts += [struct.pack("<q", len(encoded)), encoded]
    return hashlib.sha256(b"".join(parts)).digest()


@dataclass(frozen=True)
class Root:
    """The position before the first block of a chain."""

    salt: str = ""
    key: bytes = ORIGIN
    depth: int = 0
    listed: bool = True

    @property
    def extras(self) -> tuple[tuple[str, str], ...]:
        """What makes the first block one of this salt's."""
        return (("salt", self.salt),) if self.salt else ()


@dataclass(eq=False, slots=True)
class Block:
    """A block of a chain, and the position behind it.

    Args:
        key: its name.
        parent: the position before it.
        tokens: what it holds.
        value: what it stands for.
        depth: blocks up to here.
        listed: whether it can be found.
        children: blocks that continue it and are held, the oldest first.
    """

    key: bytes
    parent: Block | Root = field(repr=False)
    tokens: Tokens
    value: Any
    depth: int
    listed: bool = True
    children: list[Block] = field(default_factory=list, repr=False)

    extras = ()

    def path(self) -> list[Block]:
        """The blocks from here back to the first one."""
        blocks, at = [], self
        while at.depth:
            blocks.append(at)
            at = at.parent
        return blocks


class HashChain(PrefixIndex):
    """One dictionary from keys to blocks.

    A hash may collide, so what is found is compared: its tokens, and that the block before it is the very one that was
    found there. By induction all tokens are compared. A block whose key another one has taken is not listed.

    Args:
        policy: whose keys are those of the blocks; so a block that comes back has the name that it had.
        hash_block: names blocks, as `block_key` does.

    Cost: 1 hash a block to find or add; memory for the key, the tokens and a dictionary entry a block.
    """

    def __init__(self, policy: EvictionPolicy, hash_block: Callable[..., bytes] = block_key) -> None:
        super().__init__(policy)
        self._hash = hash_block
        self._blocks: dict[bytes, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Any]:
        return (block.value for block in self._blocks.values())

    def paths(self) -> Iterator[tuple[Hashable, ...]]:
        for block in self._blocks.values():
            path = block.path()
            yield (path[-1].parent.salt, *(at.tokens for at in reversed(path)))

    def begin(self, salt: str = "") -> Root:
        return Root(salt)

    def find(self, position: Block | Root, tokens: Tokens) -> Block | None:
        return self._held(self._hash(position.key, tokens, position.extras), position, tokens)

    def add(self, position: Block | Root, tokens: Tokens, value: Any) -> Block:
        key = self._hash(position.key, tokens, position.extras)
        if held := self._held(key, position, tokens):
            return held
        block = Block(key, position, tokens, value, position.depth + 1, position.listed and key not in self._blocks)
        if block.listed:
            self.policy.add(key)
            self._blocks[key] = block
            if position.depth:
                position.children.append(block)
        return block

    def use(self, position: Block | Root) -> None:
        for block in position.path() if position.depth else ():
            self.policy.use(block.key)

    def renew(self, position: Block | Root) -> None:
        for block in position.path() if position.depth else ():
            if block.listed:
                self.policy.renew(block.key)

    def still_held(self, match: Match) -> Match:
        positions = list(match.positions)
        while positions[-1].depth and self._blocks.get(positions[-1].key) is not positions[-1]:
            positions.pop()
        return Match(positions)

    def evict(self, in_use: Callable[[Any], bool]) -> Any:
        block = self._blocks[self.policy.victim(lambda key: not in_use(self._blocks[key].value))]
        while block.children:  # nobody uses them, since nobody uses what is before them
            block = block.children[0]
        self.policy.evict(block.key)
        self.evictions += 1
        return self._drop(block)

    def discard(self, position: Block | Root, in_use: Callable[[Any], bool]) -> list[Any]:
        values = []
        while position.depth and not (position.listed and (position.children or in_use(position.value))):
            if position.listed:
                self.policy.remove(position.key)
                values.append(self._drop(position))
            position = position.parent
        return values

    def check_invariants(self) -> None:
        """As every index; and no block is held without the one before it, and children are counted right."""
        super().check_invariants()
        assert set(self.policy) == self._blocks.keys(), "the policy holds other keys than the chain"
        children = {key: [] for key in self._blocks}
        for key, block in self._blocks.items():
            assert block.key == key and block.listed
            if block.parent.depth:
                assert self._blocks.get(block.parent.key) is block.parent, "a block's parent was evicted"
                children[block.parent.key].append(block)
        for key, block in self._blocks.items():
            assert set(block.children) == set(children[key]), "a block has lost children, or keeps those that left"

    def _drop(self, block: Block) -> Any:
        del self._blocks[block.key]
        if block.parent.depth:
            block.parent.children.remove(block)
        return block.value

    def _held(self, key: bytes, position: Block | Root, tokens: Tokens) -> Block | None:
        block = self._blocks.get(key)
        return block if block and block.tokens == tokens and block.parent == position else None
