"""Measure the two indexes of kept pages alone: what a lookup takes, what a page costs, and which policy has most hits.

No model runs here. Bytes and hits are counted; only lookups are timed.
"""

from __future__ import annotations

import gc
import itertools
import random
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tqdm import tqdm

from minilib.mechanisms.caching import Clock, EvictionPolicy, Fifo, Lfu, Lru, S3Fifo, Sieve, belady_hits
from minilib.mechanisms.content_addressing import PrefixIndex
from minilib.numbers.measure import measure
from minilib.serving.cache.prefix import DESIGNS

PAGE, VOCABULARY = 16, 8192  # tokens of a page, and how many there are
CHAINS = (16, 64, 256, 1024, 4096)  # pages of one sequence
SHARED, OWN, FORKS = 16, 4, 1024  # pages that all forks begin with, and those of each
POLICIES: tuple[type[EvictionPolicy], ...] = (Fifo, Lru, Clock, Lfu, Sieve, S3Fifo)

Path = list[tuple[int, ...]]


def lookups(chains: tuple[int, ...] = CHAINS, forks: int = FORKS, budget: float = 0.1) -> list[dict]:
    """Seconds and bytes of a page for each design: one sequence of many pages, and many forks of a short one.

    Args:
        chains: pages of the one sequence.
        forks: how many.
        budget: seconds spent on each.
    """
    shapes = [("chain", pages, lambda choices, pages=pages: [_path(choices, pages)]) for pages in chains]
    shapes.append(("forks", SHARED + forks * OWN, lambda choices: _forks(choices, forks)))
    return [
        {"design": design, "shape": shape, "pages": pages, **_lookup(design, make, pages, budget)}
        for shape, pages, make in tqdm(shapes, desc="lookups", leave=False)
        for design in DESIGNS
    ]


def _lookup(design: str, make: Callable[[random.Random], list[Path]], pages: int, budget: float) -> dict:
    gc.collect()  # empties the lists of freed objects, which would be taken again without being counted
    tracemalloc.start()
    paths = make(random.Random(pages))
    of_tokens = tracemalloc.get_traced_memory()[0]
    index = DESIGNS[design](Lru())
    _hold(index, paths)
    of_index = tracemalloc.get_traced_memory()[0] - of_tokens
    tracemalloc.stop()
    assert len(index) == pages
    found = [len(index.match(path).values) for path in paths]
    assert found == [len(path) for path in paths]

    def match() -> None:
        for path in paths:
            index.match(path)

    kept = measure(lambda: _hold(DESIGNS[design](Lru()), paths), budget=budget)
    return {
        "match_seconds": measure(match, budget=budget).seconds / sum(found),
        "keep_seconds": kept.seconds / sum(found),
        "token_bytes": of_tokens / pages,
        "index_bytes": of_index / pages,
    }


def _hold(index: PrefixIndex, paths: list[Path]) -> None:
    frames = itertools.count()
    for path in paths:
        position = index.begin()
        for tokens in path:
            position = index.add(position, tokens, next(frames))


def _path(choices: random.Random, pages: int) -> Path:
    return [tuple(choices.choices(range(VOCABULARY), k=PAGE)) for _ in range(pages)]


def _forks(choices: random.Random, forks: int) -> list[Path]:
    shared = _path(choices, SHARED)
    return [[*shared, *_path(choices, OWN)] for _ in range(forks)]


class Asked(NamedTuple):
    """A request: whose it is, and the pages of its prompt, by name."""

    tenant: str
    pages: list[bytes]


def tenants(
    requests: int, *, number: int = 50, exponent: float = 1.0, continued: float = 0.6, seed: int = 0
) -> list[Asked]:
    """Chats of many tenants; a few tenants ask most, and no page of one is a page of another.

    Each tenant has a system prompt of 8 … 40 pages. A request goes on with one of the tenant's last four chats, or
    begins a new one, and is 2 … 8 pages longer than what came before it; no chat is longer than 64 pages behind its
    system prompt.

    Args:
        requests: how many.
        number: of tenants.
        exponent: the tenant with rank r asks as often as r^-exponent says (Zipf).
        continued: share of requests that go on with a chat, where there is one.
        seed: of all choices.
    """
    choices, names = random.Random(seed), itertools.count()

    def new(least: int, most: int) -> list[bytes]:
        return [next(names).to_bytes(8, "little") for _ in range(choices.randint(least, most))]

    prompts = [new(8, 40) for _ in range(number)]
    chats: list[deque[list[bytes]]] = [deque(maxlen=4) for _ in range(number)]
    trace = []
    weights = [rank**-exponent for rank in range(1, number + 1)]
    for tenant in choices.choices(range(number), weights, k=requests):
        prompt, open_chats = prompts[tenant], chats[tenant]
        chat = prompt
        if open_chats and choices.random() < continued:
            place = choices.randrange(len(open_chats))
            chat = open_chats[place]
            del open_chats[place]
        chat = chat + new(2, 8)
        trace.append(Asked(str(tenant), chat))
        if len(chat) - len(prompt) <= 64 - 8:
            open_chats.append(chat)
    return trace


def index_hits(trace: list[Asked], index: PrefixIndex, capacity: int) -> int:
    """Pages found of all that are asked for, one request after the other; what a request asks for is held then.

    Leaves alone leave, and none that the request uses.
    """
    hits, frames = 0, itertools.count()
    for tenant, pages in trace:
        found = index.match(pages, tenant)
        index.use(found.position)
        hits += len(found.values)
        in_use, position = set(found.values), found.position
        for page in pages[len(found.values) :]:
            if len(index) == capacity:
                index.evict(in_use.__contains__)
            frame = next(frames)
            position = index.add(position, page, frame)
            in_use.add(frame)
    return hits


def evictions(requests: int = 2000, shares: tuple[float, ...] = (0.05, 0.1, 0.2)) -> dict:
    """Hits of each policy in each design on a trace of many tenants, beside the most that any policy could have.

    Belady's choice knows the future and no leaves: it may give up any page at any time, one of the request itself as
    well. So its hits bound those of every index.

    Args:
        requests: of the trace.
        shares: of its different pages that are held.
    """
    trace = tenants(requests)
    asked = list(_asked(trace))
    different = len(set(asked))
    rows = []
    for share in tqdm(shares, desc="evictions", leave=False):
        capacity = round(share * different)
        best = belady_hits(asked, capacity)
        for design in DESIGNS:
            for policy in POLICIES:
                hits = index_hits(trace, DESIGNS[design](policy()), capacity)
                assert hits <= best, f"{policy.__name__} has more hits than there can be"
                rows.append({"pages": capacity, "design": design, "policy": policy.__name__.lower(),
                             "hit_rate": hits / len(asked), "over_belady": hits / best})  # fmt: skip
        rows.append({"pages": capacity, "design": "none", "policy": "belady", "hit_rate": best / len(asked),
                     "over_belady": 1.0})  # fmt: skip
    return {"requests": requests, "asked": len(asked), "different": different, "rows": rows}


def _asked(trace: list[Asked]) -> Iterator[bytes]:
    for _, pages in trace:
        yield from pages
