"""The plans there are: star, chain, binary tree, ring, halving and doubling, two-level, all-to-all.

Each function lists transfers in an order in which they could happen one by one; `pack_rounds` finds the rounds.

Sources: Patarasuk and Yuan 2009 (ring); Thakur, Rabenseifner and Gropp 2005 (halving and doubling, and what to do with
ranks beyond a power of two); Sanders, Speck and Träff 2009 (trees); Jia et al. 2018 (two levels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minilib.mechanisms.replication.plan import Plan, PlanError, Transfer, pack_rounds


def star(collective: str, world_size: int, root: int = 0) -> Plan:
    """The root talks to everybody else itself: "broadcast", "reduce" or "all_reduce".

    Cost: the root sends or receives (n-1)·S, in n-1 rounds; twice that for an all-reduce.
    """
    others = [rank for rank in range(world_size) if rank != root]
    up = [Transfer(rank, root, 0, reduce=True) for rank in others]
    down = [Transfer(root, rank, 0) for rank in others]
    return _rooted("star", collective, world_size, 1, up, down, root)


def chain(collective: str, world_size: int, root: int = 0, num_chunks: int = 1) -> Plan:
    """Everybody passes on to the next, chunk by chunk, so that all are busy once the chain is filled.

    Cost: each rank but the last sends S, in n-2+k rounds for k chunks; twice that for an all-reduce.
    """
    line = [(root + i) % world_size for i in range(world_size)]
    hops = list(zip(line, line[1:], strict=False))
    chunks = range(num_chunks)
    up = [Transfer(dst, src, c, reduce=True) for c in chunks for src, dst in reversed(hops)]
    down = [Transfer(src, dst, c) for c in chunks for src, dst in hops]
    return _rooted("chain", collective, world_size, num_chunks, up, down, root)


def tree(collective: str, world_size: int, root: int = 0, num_chunks: int = 1) -> Plan:
    """A binary tree: place i has the children 2i+1 and 2i+2.

    Cost: an inner rank sends 2·S down, S up; 2·⌈log₂(n+1)⌉ - 2 rounds or fewer for one chunk each way.
    """
    rank_at = [(root + place) % world_size for place in range(world_size)]
    edges = [(rank_at[(place - 1) // 2], rank_at[place]) for place in range(1, world_size)]
    chunks = range(num_chunks)
    up = [Transfer(child, parent, c, reduce=True) for c in chunks for parent, child in reversed(edges)]
    down = [Transfer(parent, child, c) for c in chunks for parent, child in edges]
    return _rooted("tree", collective, world_size, num_chunks, up, down, root)


def ring(collective: str, world_size: int) -> Plan:
    """Everybody sends to the right and receives from the left: "reduce_scatter", "all_gather", or both: "all_reduce".

    Rank r owns chunk r. Cost: each rank sends (n-1)/n · S in n-1 rounds, twice that for an all-reduce: no plan sends
    less, and none that sends so little takes fewer than 2·log₂(n) rounds.
    """
    ranks = list(range(world_size))
    parts = {
        "reduce_scatter": list(_ring_reduce_scatter(ranks)),
        "all_gather": list(_ring_all_gather(ranks)),
    }
    parts["all_reduce"] = parts["reduce_scatter"] + parts["all_gather"]
    return _of("ring", collective, world_size, world_size, parts)


def halving_doubling(world_size: int) -> Plan:
    """All-reduce: halve what is exchanged and the distance each round, then double both on the way back.

    With p the largest power of two ≤ n, each of the first n-p pairs first becomes one rank.
    Cost: 2·(p-1)/p · S sent in 2·log₂(p) rounds; n no power of two: S more, each way, in two more rounds.
    """
    p = 1 << max(0, world_size.bit_length() - 1)
    fold = [Transfer(rank, rank - p, 0, reduce=True, count=p) for rank in range(p, world_size)]
    halve, double = [], []
    distance = p // 2
    while distance:
        for rank in range(p):
            kept = rank // distance * distance  # the chunks that a rank still works on begin here
            partner = rank ^ distance
            halve.append(Transfer(rank, partner, partner // distance * distance, reduce=True, count=distance))
            double.append((distance, Transfer(rank, partner, kept, count=distance)))
        distance //= 2
    back = [transfer for _, transfer in sorted(double, key=lambda pair: pair[0])]
    unfold = [Transfer(rank - p, rank, 0, count=p) for rank in range(p, world_size)]
    return Plan("halving-doubling", "all_reduce", world_size, max(1, p), pack_rounds(fold + halve + back + unfold))


def two_level(hosts: Sequence[int]) -> Plan:
    """All-reduce over ranks that live on hosts: reduce-scatter within, all-reduce between, all-gather within.

    With hosts of unlike size, each host's first rank speaks for it instead.

    Args:
        hosts: the host of each rank.

    Cost: with h hosts of m ranks, each rank sends 2·(h-1)/h · S/m between hosts: m links between two hosts share what
    a flat ring would send over one.
    """
    world_size = len(hosts)
    members = [[rank for rank in range(world_size) if hosts[rank] == host] for host in dict.fromkeys(hosts)]
    if not members:
        raise PlanError("two_level needs the host of each rank, got none")
    size, h = len(members[0]), len(members)
    if any(len(ranks) != size for ranks in members):
        return _two_level_by_leaders(members, world_size)
    transfers: list[Transfer] = []  # chunk i·h + j belongs to local rank i of host j
    for ranks in members:
        transfers += _ring_reduce_scatter(ranks, count=h)
    for i in range(size):
        column = [ranks[i] for ranks in members]
        transfers += _ring_reduce_scatter(column, first=i * h)
        transfers += _ring_all_gather(column, first=i * h)
    for ranks in members:
        transfers += _ring_all_gather(ranks, count=h)
    return Plan("two-level", "all_reduce", world_size, size * h, pack_rounds(transfers))


def all_to_all(world_size: int) -> Plan:
    """Everybody sends a chunk of its own to everybody else, to the rank s further on in round s.

    Cost: (n-1)/n · S sent in n-1 rounds.
    """
    n = world_size
    transfers = [Transfer(r, (r + s) % n, r * n + (r + s) % n) for s in range(1, n) for r in range(n)]
    return Plan("pairwise", "all_to_all", n, max(1, n * n), pack_rounds(transfers))


def two_level_all_to_all(hosts: int, ranks_per_host: int) -> Plan:
    """All-to-all in two hops: within each host to the rank of the destination's place, then between ranks of one place.

    Ranks of a host are neighbours. To be drawn, priced and simulated: to run it, a rank would have to know the sizes of
    what it passes on for others.

    Cost: with h hosts of m ranks, each rank sends h - 1 messages between hosts instead of (h - 1) · m, of m chunks
    each: as many bytes, and m - 1 messages of h chunks within its host.

    Source: Rajbhandari et al. 2022, "DeepSpeed-MoE", section 5.2.
    """
    m, n = ranks_per_host, hosts * ranks_per_host
    if hosts < 1 or m < 1:
        raise PlanError(f"two_level_all_to_all needs a host and a rank or more, got {hosts} and {m}")
    ranks = range(n)
    # Chunk src · n + dst: those for the ranks of one place are m apart, those from the ranks of a host n.
    within = [
        Transfer(r, r // m * m + (r + s) % m, r * n + (r + s) % m, count=hosts, stride=m)
        for s in range(1, m)
        for r in ranks
    ]
    between = [
        Transfer(r, (r + s * m) % n, r // m * m * n + (r + s * m) % n, count=m, stride=n)
        for s in range(1, hosts)
        for r in ranks
    ]
    return Plan("two-level", "all_to_all", n, n * n, pack_rounds(within + between))


def _ring_reduce_scatter(ranks: Sequence[int], first: int = 0, count: int = 1) -> Iterator[Transfer]:
    """Rank i of the ring ends with `count` chunks from first + i · count, complete."""
    n = len(ranks)
    for step in range(n - 1):
        for i, rank in enumerate(ranks):
            chunk = first + (i - step - 1) % n * count
            yield Transfer(rank, ranks[(i + 1) % n], chunk, reduce=True, count=count)


def _ring_all_gather(ranks: Sequence[int], first: int = 0, count: int = 1) -> Iterator[Transfer]:
    n = len(ranks)
    for step in range(n - 1):
        for i, rank in enumerate(ranks):
            yield Transfer(rank, ranks[(i + 1) % n], first + (i - step) % n * count, count=count)


def _two_level_by_leaders(members: list[list[int]], world_size: int) -> Plan:
    leaders, chunks = [ranks[0] for ranks in members], len(members)
    transfers = [Transfer(rank, ranks[0], 0, reduce=True, count=chunks) for ranks in members for rank in ranks[1:]]
    transfers += [*_ring_reduce_scatter(leaders), *_ring_all_gather(leaders)]
    transfers += [Transfer(ranks[0], rank, 0, count=chunks) for ranks in members for rank in ranks[1:]]
    return Plan("two-level", "all_reduce", world_size, chunks, pack_rounds(transfers))


def _rooted(name: str, collective: str, n: int, num_chunks: int, up: list, down: list, root: int) -> Plan:
    parts = {"reduce": up, "broadcast": down, "all_reduce": up + down}
    return _of(name, collective, n, num_chunks, parts, root)


def _of(name: str, collective: str, n: int, num_chunks: int, parts: dict[str, list], root: int = 0) -> Plan:
    if collective not in parts:
        raise PlanError(f"a {name} does {', '.join(parts)}; got {collective!r}")
    return Plan(name, collective, n, num_chunks, pack_rounds(parts[collective]), root)
