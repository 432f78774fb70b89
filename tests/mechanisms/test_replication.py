"""Plans keep what they promise, for every number of ranks; others are caught; prices and counts are closed forms."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.mechanisms.replication import (
    ContributionLost,
    CountedTwice,
    NothingToSend,
    Plan,
    PlanError,
    Transfer,
    pack_rounds,
    plans,
    seconds,
    simulate,
)

ROOTED = ("broadcast", "reduce", "all_reduce")
SIZES = [*range(1, 18), 31, 32, 33]


def all_plans(n):
    for root in {0, n // 2, n - 1}:
        for collective in ROOTED:
            yield plans.star(collective, n, root)
            for chunks in (1, 2, 5):
                yield plans.chain(collective, n, root, chunks)
                yield plans.tree(collective, n, root, chunks)
    for collective in ("reduce_scatter", "all_gather", "all_reduce"):
        yield plans.ring(collective, n)
    yield plans.halving_doubling(n)
    yield plans.all_to_all(n)
    for size in (1, 2, 3, n):
        yield plans.two_level([rank // size for rank in range(n)])
        yield plans.two_level([rank % size for rank in range(n)])  # neighbours in number live on different hosts
        if n % size == 0:
            yield plans.two_level_all_to_all(n // size, size)


def run_on_numbers(plan, seed=0):
    """An executor that knows nothing of provenance: integers, added and copied."""
    rng = np.random.default_rng(seed)
    data = rng.integers(1, 1000, (plan.world_size, plan.num_chunks))
    now = data.copy()
    for transfers in plan.rounds:
        before = now.copy()
        for t in transfers:
            for c in t.chunks:
                now[t.dst, c] = before[t.src, c] + (now[t.dst, c] if t.reduce else 0)
    return data, now


@pytest.mark.parametrize("n", SIZES)
def test_every_plan_keeps_its_promise(n):
    for plan in all_plans(n):
        simulate(plan)
        data, now = run_on_numbers(plan)
        for rank in range(n):
            for chunk, ranks in plan.promises(rank).items():
                assert now[rank, chunk] == data[sorted(ranks), chunk].sum(), (plan, rank, chunk)


@pytest.mark.parametrize("n", SIZES)
def test_messages_and_bytes_are_the_closed_forms(n):
    size = 4 * n * 15  # every plan cuts it evenly

    def sent(plan, rank):
        each = [size // plan.num_chunks] * plan.num_chunks
        return plan.bytes_sent(rank, each)

    for collective, share in (("reduce_scatter", 1), ("all_gather", 1), ("all_reduce", 2)):
        ring = plans.ring(collective, n)
        assert len(ring.rounds) == share * (n - 1)
        assert {sent(ring, rank) for rank in range(n)} == {share * (n - 1) * size // n}
    star = plans.star("all_reduce", n)
    assert (sent(star, 0), star.messages(0), len(star.rounds)) == ((n - 1) * size, n - 1, 2 * (n - 1))
    chain = plans.chain("broadcast", n, num_chunks=5)
    assert len(chain.rounds) == (n - 2 + 5 if n > 1 else 0)
    tree = plans.tree("broadcast", n)
    assert len(tree.rounds) <= max(0, 2 * math.ceil(math.log2(n + 1)) - 2)
    exchange = plans.all_to_all(n)
    assert len(exchange.rounds) == n - 1 and {exchange.messages(rank) for rank in range(n)} == {n - 1}


@pytest.mark.parametrize("power", range(7))
def test_halving_and_doubling_takes_twice_log_rounds_and_the_ring_s_bytes(power):
    n = 2**power
    plan = plans.halving_doubling(n)
    assert len(plan.rounds) == 2 * power
    assert {plan.bytes_sent(rank, [1] * plan.num_chunks) for rank in range(n)} == {2 * (n - 1)}


def test_two_levels_send_less_between_hosts():
    hosts = [rank // 4 for rank in range(16)]
    size = 16 * 60

    def between(plan):
        each = size // plan.num_chunks
        crossing = [t for group in plan.rounds for t in group if hosts[t.src] != hosts[t.dst]]
        return sum(t.count * each for t in crossing), max(plan.messages(rank) for rank in range(16))

    flat, two = between(plans.ring("all_reduce", 16)), between(plans.two_level(hosts))
    assert flat[0] == 4 * 30 * size // 16 and two[0] == 16 * 2 * 3 * size // 16  # 4 links against 16 that share it
    assert two[1] == 2 * 3 + 2 * 3 < flat[1] == 30


@pytest.mark.parametrize(("h", "m"), [(1, 1), (1, 4), (4, 1), (2, 3), (4, 8)])
def test_a_two_level_all_to_all_sends_few_messages_between_hosts_and_the_same_bytes(h, m):
    flat, two = plans.all_to_all(h * m), plans.two_level_all_to_all(h, m)

    def between(plan):
        sent = [t for transfers in plan.rounds for t in transfers if t.src == 0 and t.dst // m != 0]
        return len(sent), sum(t.count for t in sent)

    assert between(flat) == ((h - 1) * m, (h - 1) * m)
    assert between(two) == (h - 1, (h - 1) * m)
    assert [two.messages(rank) for rank in range(h * m)] == [m - 1 + h - 1] * (h * m)


@pytest.mark.parametrize("n", SIZES)
def test_in_a_round_everybody_sends_once_and_receives_once(n):
    for plan in all_plans(n):
        for transfers in plan.rounds:
            assert transfers, "an empty round"
            assert len({t.src for t in transfers}) == len({t.dst for t in transfers}) == len(transfers)


def broken(plan, at, **changes):
    """The plan with one transfer changed."""
    rounds = [list(group) for group in plan.rounds]
    rounds[at[0]][at[1]] = replace(rounds[at[0]][at[1]], **changes)
    return replace(plan, rounds=tuple(map(tuple, rounds)))


def without(plan, at):
    rounds = [list(group) for group in plan.rounds]
    del rounds[at[0]][at[1]]
    return replace(plan, rounds=tuple(map(tuple, rounds)))


def test_mistakes_are_named():
    ring = plans.ring("all_reduce", 4)
    with pytest.raises(ContributionLost, match="lacks"):
        simulate(broken(ring, (1, 2), reduce=False))
    with pytest.raises(CountedTwice, match="twice"):
        simulate(replace(ring, rounds=ring.rounds[:3] + (ring.rounds[2],) + ring.rounds[3:]))
    gather = plans.ring("all_gather", 4)
    with pytest.raises(NothingToSend, match="round 1: rank 0 has no chunk 2 to send to rank 1"):
        simulate(broken(gather, (0, 0), chunk=2))


@settings(max_examples=150)
@given(st.data())
def test_no_transfer_of_a_plan_is_superfluous(data):
    n = data.draw(st.integers(2, 9))
    plan = data.draw(st.sampled_from(list(all_plans(n))))
    places = [(i, j) for i, group in enumerate(plan.rounds) for j in range(len(group))]
    if places:
        with pytest.raises(PlanError):
            simulate(without(plan, data.draw(st.sampled_from(places))))


@settings(max_examples=150)
@given(st.data())
def test_packing_changes_nothing_but_the_rounds(data):
    """Transfers one by one, in the order given, leave the same numbers behind as packed."""
    n, chunks = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    one = st.builds(
        lambda src, step, chunk, reduce: Transfer(src, (src + step) % n, chunk, reduce),
        st.integers(0, n - 1), st.integers(1, n - 1), st.integers(0, chunks - 1), st.booleans(),
    )  # fmt: skip
    transfers = data.draw(st.lists(one, max_size=20))
    packed = Plan("any", "all_reduce", n, chunks, pack_rounds(transfers))
    single = Plan("any", "all_reduce", n, chunks, tuple((t,) for t in transfers))
    assert sum(map(len, packed.rounds)) == len(transfers)
    np.testing.assert_array_equal(run_on_numbers(packed)[1], run_on_numbers(single)[1])


def test_the_price_is_latency_and_bytes_round_by_round():
    link = SimpleNamespace(latency=1e-5, bandwidth=1e9)
    ring = plans.ring("all_reduce", 4)
    assert seconds(ring, [1000] * 4, link) == pytest.approx(6 * (1e-5 + 1e-6))
    assert seconds(ring, [1000] * 4, link, reduce_rate=1e9) == pytest.approx(6 * (1e-5 + 1e-6) + 3 * 1e-6)
    shared = SimpleNamespace(latency=1e-6, bandwidth=1e8)  # each round has four messages, one after another
    assert seconds(ring, [1000] * 4, link, bus=shared) == pytest.approx(6 * 4 * 1.1e-5)
    assert seconds(ring, [0] * 4, link) == 0
    assert seconds(plans.ring("all_reduce", 1), [1000], link) == 0
    slow = SimpleNamespace(latency=1e-3, bandwidth=1e6)
    two = plans.two_level([0, 0, 1, 1])
    between = lambda src, dst: slow if src // 2 != dst // 2 else link  # noqa: E731
    assert seconds(two, [250] * 4, between) == pytest.approx(2 * (1e-5 + 5e-7) + 2 * (1e-3 + 250e-6))
    assert seconds(two, [250] * 4, between) < seconds(ring, [250] * 4, between)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Plan("x", "gossip", 2, 1, ()), "collective is one of"),
        (lambda: plans.ring("all_reduce", 0), "needs ranks"),
        (lambda: plans.star("broadcast", 3, root=3), "root among the ranks"),
        (lambda: plans.ring("broadcast", 3), "a ring does reduce_scatter"),
        (lambda: plans.two_level([]), "needs the host of each rank"),
        (lambda: plans.two_level_all_to_all(0, 4), "needs a host and a rank or more, got 0 and 4"),
        (lambda: Plan("x", "broadcast", 2, 1, ((Transfer(0, 2, 0),),)), "not between two of 2 ranks"),
        (lambda: Plan("x", "broadcast", 2, 1, ((Transfer(0, 0, 0),),)), "not between two"),
        (lambda: Plan("x", "broadcast", 2, 1, ((Transfer(0, 1, 1),),)), "1 chunks"),
        (
            lambda: Plan("x", "broadcast", 3, 1, ((Transfer(0, 1, 0), Transfer(0, 2, 0)),)),
            "rank 0 is src of 2 messages",
        ),
    ],
)
def test_what_is_no_plan_is_refused(make, says):
    with pytest.raises(PlanError, match=says):
        make()
