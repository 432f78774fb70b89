"""A hash chain and a radix tree hold what a plain set of paths holds, and give up leaves that nobody uses, alone."""

import hashlib
import itertools
import random
from collections import Counter

import pytest

from minilib.mechanisms.caching import Clock, Fifo, Lfu, Lru, NothingToEvict, S3Fifo, Sieve
from minilib.mechanisms.content_addressing import ORIGIN, HashChain, RadixTree, block_key

POLICIES = [Fifo, Lru, Clock, Lfu, Sieve, S3Fifo]
DESIGNS = {
    "chain": HashChain,
    "radix": RadixTree,
    "chain, 3 bits of hash": lambda policy: HashChain(policy, lambda *parts: bytes([block_key(*parts)[0] % 8])),
    "chain, no hash": lambda policy: HashChain(policy, lambda *parts: b""),
}
EXACT = ["chain", "radix"]


def fill(index, blocks, salt="", value=None):
    """Hold a path; its last position. The value of a block is its path, unless given."""
    position = index.begin(salt)
    for depth, tokens in enumerate(blocks, 1):
        position = index.add(position, tokens, (salt, *blocks[:depth]) if value is None else value)
    return position


def letters(text):
    """One block for each letter."""
    return [letter.encode() for letter in text]


def idle(value):
    return False


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("design", DESIGNS)
def test_any_order_of_operations(design, policy):
    """The model is a set of paths. A hash that collides may hold less, and must never return another path's value."""
    choices = random.Random(f"{design}/{policy.__name__}")
    index, model, uses, done = DESIGNS[design](policy()), set(), Counter(), Counter()
    held, earlier = [], {}  # (path, position) of readers, and what was found for a path when it was last looked up
    for _ in range(500):
        blocks = [(choices.randrange(2), choices.randrange(2)) for _ in range(choices.randrange(1, 6))]
        path = (choices.choice(["", "a"]), *blocks)
        name = choices.choice(["read", "leave", "grow", "evict", "evict", "evict", "match", "discard"])
        if name == "read":
            position = fill(index, blocks, path[0])
            held.append((path, position))
            uses.update(path[:depth] for depth in range(2, len(path) + 1))
            model |= {path[:depth] for depth in range(2, len(path) + 1)} if design in EXACT else set()
        elif name == "leave" and held:
            path, position = held.pop(choices.randrange(len(held)))
            index.renew(position)
            uses.subtract(path[:depth] for depth in range(2, len(path) + 1))
        elif name == "discard" and held:
            path, position = held.pop(choices.randrange(len(held)))
            uses.subtract(path[:depth] for depth in range(2, len(path) + 1))
            left = set(index.paths())
            for given_up in index.discard(position, lambda path: uses[path] > 0):
                assert given_up in left and not any(other[:-1] == given_up for other in left) and not uses[given_up]
                left.remove(given_up)
            assert set(index.paths()) == left and path not in left - {other[:-1] for other in left} - (+uses).keys()
            model &= left
        elif name == "grow" and held:  # from a position that others may have cut or grown past since
            path, position = held.pop()
            longer = (*path, blocks[0])
            held.append((longer, index.add(position, blocks[0], longer)))
            uses[longer] += 1
            model |= {longer} if design in EXACT else set()
        elif name == "evict":
            before = set(index.paths())
            leaves = {path for path in before if not any(other[:-1] == path for other in before)}
            try:
                victim = index.evict(lambda path: uses[path] > 0)
            except NothingToEvict:
                assert not [path for path in leaves if not uses[path]]
                name = "nothing to evict"
            else:
                assert victim in leaves and not uses[victim]
                assert set(index.paths()) == before - {victim}
                model.discard(victim)
        else:
            match = index.match(blocks, path[0])
            still = index.still_held(earlier.get(path, index.match([], path[0])))
            assert index.extend(still, blocks[still.position.depth :]).values == match.values
            earlier[path] = match
            longest = max([n for n in range(len(path)) if n == 0 or path[: n + 1] in model])
            assert len(match.values) == match.position.depth
            assert match.values == [path[: depth + 2] for depth in range(len(match.values))]
            if design in EXACT:
                assert len(match.values) == longest
            index.use(match.position)
        index.check_invariants()
        if design in EXACT:
            assert set(index.paths()) == set(index) == model
        done[name] += 1
    assert min(done[name] for name in ("evict", "grow", "leave", "match", "discard", "nothing to evict")) > 2
    assert index.evictions == done["evict"]


@pytest.mark.parametrize("design", EXACT)
def test_the_last_block_of_a_chain_leaves_first_and_the_first_last(design):
    for policy in POLICIES:
        index = DESIGNS[design](policy())
        fill(index, [(n,) for n in range(6)])
        gone = [index.evict(idle)[-1] for _ in range(6)]
        assert gone == [(n,) for n in reversed(range(6))], policy
        with pytest.raises(NothingToEvict):
            index.evict(idle)


@pytest.mark.parametrize("design", EXACT)
def test_what_is_used_stays_and_so_does_what_comes_before_it(design):
    """Of A and B, which share two blocks, B alone may go."""
    index = DESIGNS[design](Lru())
    fill(index, letters("abcd"))
    fill(index, letters("abxy"))
    used = {("", *letters("abcd")[:depth]) for depth in range(1, 5)}
    assert {index.evict(used.__contains__) for _ in range(2)} == {("", *letters(text)) for text in ("abxy", "abx")}
    with pytest.raises(NothingToEvict):
        index.evict(used.__contains__)
    assert len(index) == 4


@pytest.mark.parametrize("design", EXACT)
def test_lru_keeps_the_prefix_that_was_matched_last(design):
    index = DESIGNS[design](Lru())
    for name in (0, 1, 2):
        fill(index, [(name, n) for n in range(3)])
    index.use(index.match([(0, n) for n in range(3)]).position)
    gone = [index.evict(idle)[-1] for _ in range(6)]
    assert gone == [(1, 2), (1, 1), (1, 0), (2, 2), (2, 1), (2, 0)]


@pytest.mark.parametrize("design", EXACT)
def test_an_eviction_does_not_ask_about_all_that_is_held(design):
    """Chains that grew side by side: first blocks are the oldest, and each is continued."""

    class Asked(Lru):
        calls = 0

        def victim(self, evictable):
            def counted(key):
                self.calls += 1
                return evictable(key)

            return super().victim(counted)

    index = DESIGNS[design](policy := Asked())
    positions = [index.begin() for _ in range(16)]
    for depth in range(64):
        positions = [index.add(position, (row, depth), row) for row, position in enumerate(positions)]
    assert {index.evict(idle) for _ in range(32)} == {0}, "the chain that came first leaves first"
    assert policy.calls == 32


@pytest.mark.parametrize("design", EXACT)
def test_whoever_came_first_keeps_the_value(design):
    index = DESIGNS[design](Lru())
    assert fill(index, letters("ab"), value=1).value == 1
    assert fill(index, letters("abc"), value=2).value == 2
    assert index.match(letters("abc")).values == [1, 1, 2]
    assert index.match(letters("bc")).values == [] and index.match([]).values == []


@pytest.mark.parametrize("design", EXACT)
def test_a_salt_separates_all_that_follows(design):
    index = DESIGNS[design](Lru())
    for salt in ("", "a", "b", "salt"):
        fill(index, letters("xyz"), salt)
    assert len(index) == 12
    for salt in ("", "a", "b", "salt"):
        assert index.match(letters("xyz"), salt).values == [(salt, *letters(text)) for text in ("x", "xy", "xyz")]
    assert index.match(letters("xyz"), "c").values == []


def test_a_hash_that_collides_is_never_served():
    """Same key, other tokens; and the same tokens with the same key behind another block."""
    index = HashChain(Lru(), lambda parent, tokens, extras: tokens[-1:])
    fill(index, [b"a1", b"b2", b"c3"])
    assert index.match([b"x1"]).values == []
    assert index.match([b"a1", b"x2"]).values == [("", b"a1")]
    unlisted = fill(index, [b"y4", b"b2"])
    assert not unlisted.listed and not index.add(unlisted, b"z9", None).listed
    assert index.match([b"y4", b"b2"]).values == [("", b"y4")]
    assert index.match([b"a1", b"b2", b"c3"]).values[-1] == ("", b"a1", b"b2", b"c3")
    assert len(index) == 4
    index.check_invariants()


def test_a_run_of_blocks_is_one_node_until_somebody_leaves_it():
    tree = RadixTree(Lru())
    position = fill(tree, "abcdef")
    assert tree.num_runs == 1
    fill(tree, "abcxy")
    assert tree.num_runs == 3 and len(tree) == 8
    fill(tree, "abc")
    fill(tree, "abcde")
    assert tree.num_runs == 3
    assert tree.add(position, "g", 1).depth == 7 and tree.num_runs == 3, "a position outlives the cut"
    tree.evict(lambda value: value == 1)
    assert tree.num_runs == 3 and len(tree) == 8
    tree.evict(lambda value: value == 1)
    assert tree.num_runs == 2 and len(tree) == 7


@pytest.mark.parametrize("design", EXACT)
def test_a_policy_serves_one_index(design):
    policy = Lru()
    policy.add("somebody else's")
    with pytest.raises(ValueError, match="1 keys"):
        DESIGNS[design](policy)
    policy = Lru()
    DESIGNS[design](policy)
    for other in DESIGNS.values():  # before either holds a key
        with pytest.raises(ValueError, match="serves one index, and this one holds 0 keys of another"):
            other(policy)


def test_a_key_is_sha_256_of_parent_tokens_and_extras():
    """The bytes that are hashed, written out by hand."""
    raw = bytes(32) + b"\x01" + (3).to_bytes(8, "little") + b"abc"
    assert block_key(ORIGIN, b"abc") == hashlib.sha256(raw).digest()
    words = b"".join(token.to_bytes(8, "little") for token in (7, 2**40))
    raw = b"p" * 32 + b"\x00" + (16).to_bytes(8, "little") + words
    raw += (4).to_bytes(8, "little") + b"salt" + (2).to_bytes(8, "little") + "é".encode()
    assert block_key(b"p" * 32, (7, 2**40), [("salt", "é")]) == hashlib.sha256(raw).digest()


def test_no_two_different_blocks_are_hashed_alike():
    """Parts are not run together: neither tokens and bytes, nor kinds and values, nor one extra and the next."""
    contents = [b"", b"a", b"ab", (), (1,), (1, 2), (97,), tuple(b"ab"), bytes(8), (0,)]
    extras = [
        (),
        (("salt", "x"),),
        (("lora", "x"),),
        (("lora", "x"), ("salt", "x")),
        (("sal", "tx"),),
        (("salt", ""),),
        (("s", "a"), ("l", "t")),
        (("sa", "lt"),),
        (("salt", "\udcff"),),
    ]
    keys = {block_key(parent, *rest) for parent in (ORIGIN, b"1" * 32) for rest in itertools.product(contents, extras)}
    assert len(keys) == 2 * len(contents) * len(extras)
