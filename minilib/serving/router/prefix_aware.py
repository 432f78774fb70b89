"""Prefix-aware routing: a request goes where its prompt's beginning was computed, unless too much is going on there.

    prompt      [ system │ turn 1 │ answer 1 │ turn 2 ]       blocks, named by a hash chain
    replica 0     held     held     held                      longest match: chosen, if its load is within the bound
    replica 1     held
    replica 2                                                 a miss goes to the least load, whatever is held there

What a replica holds is an estimate: prefixes that were sent there lately (`SentPrefixes`). A replica may have evicted
them, or may hold more; the answer is right in any case, and only its price is not.

Sources: Zheng et al., "SGLang", NeurIPS 2024, and its router's cache-aware policy (a bound of both a difference and a
ratio of loads); llm-d, "KV-Cache Wins You Can See", 2025 (an approximate index with LRU beside a precise one).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from minilib.mechanisms.balancing import Heedless, LeastLoaded, Policy, up_among
from minilib.mechanisms.caching import Cache, Lru
from minilib.mechanisms.content_addressing import ORIGIN, block_key

TEXT_BLOCK = 64  # bytes of text in a block: about 16 tokens, a page of the server
Block = bytes | tuple[int, ...]


@dataclass(frozen=True)
class RoutingKey:
    """What a router knows of a request before it is served.

    Args:
        session: whose turn it is; "" where nobody said.
        blocks: the whole blocks of the prompt, of bytes of text or of token ids.
        salt: prompts with different salts share nothing.
    """

    session: str = ""
    blocks: tuple[Block, ...] = ()
    salt: str = ""

    @classmethod
    def of_text(cls, text: str, session: str = "", salt: str = "", size: int = TEXT_BLOCK) -> RoutingKey:
        """The key of a prompt in text, whose blocks are `size` bytes of UTF-8; what is left over has no block."""
        return cls(session, _blocks(text.encode("utf-8", "surrogatepass"), size), salt)

    @classmethod
    def of_tokens(cls, tokens: Sequence[int], session: str = "", salt: str = "", size: int = 16) -> RoutingKey:
        """The key of a prompt in token ids."""
        return cls(session, _blocks(tuple(tokens), size), salt)

    @cached_property
    def names(self) -> list[bytes]:
        """The name of each block, which depends on all blocks before it and on the salt."""
        names, extras = [], (("salt", self.salt),) if self.salt else ()
        for block in self.blocks:
            names.append(block_key(names[-1] if names else ORIGIN, block, () if names else extras))
        return names

    @cached_property
    def ticket(self) -> object:
        """What tells this request from all others, also from those with an equal key."""
        return object()


class HeldPrefixes(Protocol):
    """Which prefixes are held where, as far as the router knows."""

    def depths(self, key: RoutingKey, num_targets: int) -> Sequence[int]:
        """Blocks of the longest prefix of a key's prompt that each target holds."""

    def sent(self, target: int, key: RoutingKey) -> None:
        """A request goes to a target."""

    def withdraw(self, target: int, key: RoutingKey) -> None:
        """A target has refused this very request, and holds nothing because of it."""

    def forget(self, target: int) -> None:
        """A target has lost what it held."""


class SentPrefixes:
    """An estimate: a target holds what was sent there, the newest of it.

    Args:
        max_blocks: most blocks that are remembered of each target, about as many as it has pages; what was used
            longest ago is forgotten, the last block of a prompt before those in front of it.

    Raises:
        ValueError: if there may be no block.

    Cost: 1 hash a block of the prompt, however many targets there are, and memory for max_blocks names a target.
    """

    def __init__(self, max_blocks: int) -> None:
        if max_blocks < 1:
            raise ValueError(f"1 block or more must be remembered, got max_blocks={max_blocks!r}")
        self.max_blocks = max_blocks
        self._held: defaultdict[int, Cache] = defaultdict(lambda: Cache(max_blocks, Lru()))

    def depths(self, key: RoutingKey, num_targets: int) -> list[int]:
        """As `HeldPrefixes`."""
        held = [self._held[target] for target in range(num_targets)]
        return [sum(1 for _ in itertools.takewhile(names.__contains__, key.names)) for names in held]

    def sent(self, target: int, key: RoutingKey) -> None:
        """As `HeldPrefixes`."""
        held = self._held[target]
        for name in reversed(key.names[: self.max_blocks]):
            held.put(name, held.get(name, key.ticket))

    def withdraw(self, target: int, key: RoutingKey) -> None:
        """As `HeldPrefixes`: forgets the blocks that this request was the first one to bring there."""
        held = self._held[target]
        for name in [name for name in key.names if name in held and held.get(name) is key.ticket]:
            held.remove(name)

    def forget(self, target: int) -> None:
        """As `HeldPrefixes`."""
        self._held.pop(target, None)

    def check_invariants(self) -> None:
        """No more blocks are remembered than may be."""
        for held in self._held.values():
            held.check_invariants()
            assert len(held) <= self.max_blocks, f"{len(held)} blocks are remembered, {self.max_blocks} may be"


class PrefixAware(Heedless):
    """The target that holds most of the prompt, among those that are not overloaded; the least loaded if none does.

    A target is overloaded if its load exceeds the least one both by more than `gap` and by more than `ratio` times:
    5 requests beside 1 are no imbalance, and neither are 105 beside 100. Among equals the least loaded is chosen,
    among these the next in turn.

    Targets may be added at any time.

    Args:
        max_blocks: of `SentPrefixes`.
        least_share: share of the prompt's blocks that must be held for a match to count, so that a few words which all
            prompts begin with attract nobody.
        gap, ratio: the bound.
        num_routers: routers before the same targets. Each sees its own requests alone, hence 1/num_routers of the
            difference between two loads, and divides `gap` by that number.
        held: which prefixes are held where, in the place of an estimate.

    Attributes:
        matched_blocks, asked_blocks: blocks that were held where requests went, and all their blocks, so far.

    Raises:
        ValueError: if an argument is out of range.

    Cost: that of the index, and O(num_targets).
    """

    def __init__(
        self,
        max_blocks: int = 2**15,
        least_share: float = 0.25,
        gap: float = 4,
        ratio: float = 1.5,
        num_routers: int = 1,
        held: HeldPrefixes | None = None,
    ) -> None:
        if not (0 < least_share <= 1 and 0 <= gap < math.inf and 1 <= ratio < math.inf and num_routers >= 1):
            raise ValueError(
                "least_share in (0, 1], gap ≥ 0, ratio ≥ 1 and num_routers ≥ 1 are needed, got "
                f"{least_share!r}, {gap!r}, {ratio!r} and {num_routers!r}"
            )
        self.held = SentPrefixes(max_blocks) if held is None else held
        self.least_share, self.gap, self.ratio = least_share, gap / num_routers, ratio
        self.turn = self.matched_blocks = self.asked_blocks = 0

    def choose(self, key: RoutingKey, loads: Sequence[float]) -> int:
        """The longest match within the bound, or the least load."""
        up = up_among(loads)
        least = min(loads[target] for target in up)
        within = [t for t in up if loads[t] - least <= self.gap or loads[t] <= self.ratio * least]
        depths = self.held.depths(key, len(loads))
        best = max(depths[target] for target in within)
        if best and best >= self.least_share * len(key.blocks):
            candidates = [target for target in within if depths[target] == best]
        else:
            candidates = up
        chosen = min(candidates, key=lambda target: (loads[target], (target - self.turn) % len(loads)))
        self.turn = chosen + 1
        self.matched_blocks += depths[chosen]
        self.asked_blocks += len(key.blocks)
        self.held.sent(chosen, key)
        return chosen

    def withdraw(self, target: int, key: RoutingKey) -> None:
        """A target has refused the request with this very key."""
        self.held.withdraw(target, key)

    def forget(self, target: int) -> None:
        """A target has restarted, or another one has taken its place: it holds nothing."""
        self.held.forget(target)


class BySession(Heedless):
    """A policy that is asked with a request's session in the place of its key.

    Args:
        make_policy: number of targets → a policy by key, such as Sticky or BoundedHashing; it is made anew when there
            are more targets, and moves few sessions if its hashing is consistent.

    Attributes:
        others: where requests without a session go: to the least load.
    """

    def __init__(self, make_policy: Callable[[int], Policy]) -> None:
        self.make_policy, self.others = make_policy, LeastLoaded()
        self._policy, self._num_targets = None, 0

    def choose(self, key: RoutingKey, loads: Sequence[float]) -> int:
        """As the policy chooses for the session."""
        if not key.session:
            return self.others.choose(key, loads)
        if self._num_targets != len(loads):
            self._policy, self._num_targets = self.make_policy(len(loads)), len(loads)
        return self._policy.choose(key.session, loads)


def _blocks(content: bytes | tuple[int, ...], size: int) -> tuple[Block, ...]:
    if size < 1:
        raise ValueError(f"a block has a size of 1 or more, got {size!r}")
    return tuple(content[at : at + size] for at in range(0, len(content) - size + 1, size))
