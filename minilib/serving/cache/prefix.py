"""Prefix caching: a request whose first tokens were computed before takes their pages over instead of computing them.

    prompt      [ system prompt │ system prompt │ question ]
    match             page 3          page 8                   held already: shared, as forks share pages
    compute                                        page 5      and then kept for whoever comes next

Full pages are kept, those of answers too, since a chat sends them back. A kept page that no sequence holds counts as
free, and leaves when its frame is needed (keeping_pool.py), what nothing continues first. Whoever is matched computes
its last token in any case, as that token's logits are what it wants: if even its page is kept, it is copied before
it is written to.

Sources: vLLM, "Automatic Prefix Caching" (design document); Zheng et al., "SGLang: Efficient Execution of Structured
Language Model Programs", NeurIPS 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.caching import EvictionPolicy, Lru
from minilib.mechanisms.content_addressing import ORIGIN, HashChain, PrefixIndex, RadixTree
from minilib.mechanisms.content_addressing.index import Match
from minilib.model.decoder import Decoder
from minilib.serving.cache.page_file import PageName
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.tiers import SecondTier, Tiers
from minilib.serving.sequence import Sequence, Status

DESIGNS: dict[str, type[PrefixIndex]] = {"hash": HashChain, "radix": RadixTree}


class PrefixCache:
    """What the pages of a pool hold, found by tokens.

    Args:
        cache: whose pages are kept; its pool is a `KeepingPool`.
        design: "hash", a chain of block hashes as in vLLM, or "radix", a tree of tokens as in SGLang.
        policy: chooses the page that leaves; it belongs to this cache alone.
        tiers: where pages go that leave, if anywhere.

    Attributes:
        index: tokens → pages.
        tokens_matched: tokens that were taken over, by all sequences that were let in.
        tokens_loaded: those of them that came back from another tier.
        tokens_asked: tokens of those sequences.

    Raises:
        ValueError: for a design that is unknown, or a policy that has another owner.

    Cost: the tokens of a page are hashed or compared once when it is full, and once when a sequence that has them is
    looked up. Who waits is looked up at each step: then a chain hashes one page, the first that is not held, and a tree
    compares all that are.
    """

    def __init__(self, cache: PagedCache, design: str, policy: EvictionPolicy, tiers: Tiers | None = None) -> None:
        if design not in list(DESIGNS):
            raise ValueError(f"prefix_cache is one of {', '.join(DESIGNS)}, or None; got {design!r}")
        self.index = DESIGNS[design](policy)
        self.cache, self.pool, self.page_size = cache, cache.pool, cache.page_size
        self.pool.reclaim = self._reclaim
        self.tiers = tiers
        self._names: dict[int, PageName] = {}  # of kept pages, if there is another tier
        self._matches: WeakKeyDictionary[Sequence, Match] = WeakKeyDictionary()  # of those that wait
        self.tokens_matched = self.tokens_loaded = self.tokens_asked = 0

    def num_matching(self, sequence: Sequence) -> int:
        """Tokens of a sequence that are held in full pages, its last one too; counts as no use."""
        return len(self._match(sequence).values) * self.page_size

    def attach(self, sequence: Sequence) -> bool:
        """Give a sequence without pages those that are held for its tokens, if the rest of its tokens have room, too.

        Returns:
            False if there is no room; nothing was changed then.
        """
        found = self._match(sequence)
        frames, length, size = found.values, len(sequence.token_ids), self.page_size
        # The page of the last token is written to. If there is no room for a copy of it, it is computed anew.
        for num_pages in (len(frames), len(frames) - 1) if len(frames) * size == length else (len(frames),):
            copied = num_pages * size == length
            idle = sum(map(self.pool.is_idle, frames[:num_pages]))
            if ceil_div(length, size) - num_pages + copied + idle <= self.pool.num_free:
                break
        else:
            return False
        del self._matches[sequence]
        self.index.use(found.positions[num_pages])
        table = sequence.table
        table.frames = [self.pool.share(frame) for frame in frames[:num_pages]]
        table.length = sequence.num_computed_tokens = min(num_pages * size, length - 1)
        sequence.stored = found.positions[table.length // size]
        if self.tiers:
            try:
                self._load(sequence)
            except BaseException:
                table.release()
                sequence.num_computed_tokens, sequence.stored = 0, None
                raise
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = table.length
        self.tokens_matched += table.length
        self.tokens_asked += length
        return True

    def store(self, sequence: Sequence) -> None:
        """Keep the pages that a sequence has filled since it was last stored.

        If a page is held already, since somebody else computed the same tokens, it replaces the sequence's own.
        """
        size, table = self.page_size, sequence.table
        position = sequence.stored or self.index.begin(sequence.params.cache_salt)
        for page in range(position.depth, sequence.num_computed_tokens // size):
            own = table.frames[page]
            position = self.index.add(position, tuple(sequence.token_ids[page * size : (page + 1) * size]), own)
            if not position.listed:
                continue
            if position.value != own:
                table.frames[page] = self.pool.share(position.value)
                self.pool.release(own)
            elif own not in self.pool.kept:
                self.pool.keep(own)
                if self.tiers:
                    self._names[own] = self._name(sequence, page)
        sequence.stored = position

    def renew(self, sequence: Sequence) -> None:
        """A sequence gives back the pages that it has read in each of its steps: they are not as old as its first."""
        if sequence.stored:
            self.index.renew(sequence.stored)

    def discard(self, sequence: Sequence) -> None:
        """Forget the pages of a sequence that has ended, from its last one back to one that others use or continue.

        For a sequence whose logits were no numbers: if its keys and values are to blame, whoever begins alike would
        fail as well, for as long as they are kept.
        """
        for frame in self.index.discard(sequence.stored, self.pool.in_use) if sequence.stored else ():
            self._names.pop(frame, None)
            self.pool.drop(frame)

    def clear(self) -> int:
        """Forget what no sequence uses, in all tiers, as must be done when the model's weights have changed.

        Returns:
            Pages that are kept still, since sequences use them.
        """
        while self.pool.num_idle:
            frame = self.index.evict(self.pool.in_use)
            self._names.pop(frame, None)
            self.pool.drop(frame)
        if self.tiers:
            self.tiers.clear()
        return len(self.index)

    def check_invariants(self, sequences: list[Sequence]) -> None:
        """What is kept is what the index holds; what a sequence holds is found under its tokens, from the first on."""
        self.index.check_invariants()
        assert sorted(self.index) == sorted(self.pool.kept), "index and pool keep different pages"
        if self.tiers:
            self.tiers.check_invariants()
            assert self._names.keys() == self.pool.kept, "a page has no name, or a name no page"
        for sequence in sequences:
            if sequence.status is not Status.RUNNING:
                assert sequence.stored is None, "a position is remembered, and its pages are gone"
                continue
            depth = sequence.stored.depth
            assert depth == sequence.num_computed_tokens // self.page_size, "full pages were not stored"
            if sequence.stored.listed:
                blocks = itertools.islice(self._blocks(sequence, 0), depth)
                held = self.index.match(blocks, sequence.params.cache_salt).values
                assert held == sequence.table.frames[:depth], f"{sequence.request_id} holds pages of other tokens"

    def _match(self, sequence: Sequence) -> Match:
        """The pages that are held for a sequence; what was found before and is held still is not looked up again."""
        known = self._matches.get(sequence) or Match([self.index.begin(sequence.params.cache_salt)])
        held = self.index.still_held(known)
        found = self._matches[sequence] = self.index.extend(held, self._blocks(sequence, held.position.depth))
        return found

    def _blocks(self, sequence: Sequence, first: int) -> Iterator[tuple[int, ...]]:
        """The tokens of each full page, from one on."""
        tokens, size = sequence.token_ids, self.page_size
        return (tuple(tokens[at : at + size]) for at in range(first * size, len(tokens) - size + 1, size))

    def _load(self, sequence: Sequence) -> None:
        """Bring back the pages that follow those of a sequence, as many as come cheaper than computing their tokens."""
        table, names = sequence.table, []
        if table.length % self.page_size:
            return  # all but the last token are there
        for page in range(len(table.frames), (len(sequence.token_ids) - 1) // self.page_size):
            name = self._name(sequence, page, names[-1] if names else None)
            if name not in self.tiers:
                break
            names.append(name)
        names = names[: self.tiers.worth(table.length, names)]
        if not names:
            return
        contents = list(itertools.takewhile(lambda content: content is not None, map(self.tiers.get, names)))
        table.append(len(contents) * self.page_size)
        for page, content in enumerate(contents, len(table.frames) - len(contents)):
            self.cache.k[:, table.frames[page]], self.cache.v[:, table.frames[page]] = content
        sequence.num_computed_tokens = table.length
        self.tokens_loaded += len(contents) * self.page_size
        self.store(sequence)

    def _name(self, sequence: Sequence, page: int, before: PageName | None = None) -> PageName:
        """The name of a sequence's page in every tier; `before` is that of the page before, if that has no frame."""
        size, salt = self.page_size, sequence.params.cache_salt
        tokens = tuple(sequence.token_ids[page * size : (page + 1) * size])
        if not page:
            return PageName.of(ORIGIN, tokens, (("salt", salt),) if salt else ())
        before = before or self._names[sequence.table.frames[page - 1]]
        return PageName.of(before.key, tokens, ())

    def _reclaim(self) -> None:
        """Give up one page that nobody uses, the last one of its chain; it goes to another tier, if there is one."""
        frame = self.index.evict(self.pool.in_use)
        name = self._names.pop(frame, None)
        try:
            if name:
                self.tiers.put(name, frame)
        finally:
            self.pool.drop(frame)


def prefix_cache_as_asked(
    cache: PagedCache,
    model: Decoder,
    design: str | None,
    eviction: EvictionPolicy | None,
    second_tier: SecondTier | None,
) -> PrefixCache | None:
    """What keeps the pages of an engine's pool, as the engine's options ask for it; None keeps nothing.

    Raises:
        ValueError: for options about kept pages where none are kept, or as `PrefixCache` and `Tiers`.
        TypeError: if the second tier or the eviction policy is none.
    """
    if not design:
        if eviction is not None or second_tier is not None:
            raise ValueError("eviction and second_tier are for kept pages; give prefix_cache, too")
        return None
    if not isinstance(second_tier, SecondTier | None):
        raise TypeError(f"second_tier is a SecondTier, got {second_tier!r}")
    tiers = Tiers(cache, model, second_tier) if second_tier else None
    return PrefixCache(cache, design, Lru() if eviction is None else eviction, tiers)
