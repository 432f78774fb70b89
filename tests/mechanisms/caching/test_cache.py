"""A cache against a plain model: two dictionaries and the rule that what is pinned stays and what fits is held."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minilib.mechanisms.caching import (
    Cache,
    Clock,
    DoesNotFit,
    EntryInUse,
    EntryTooLarge,
    Fifo,
    Lfu,
    Lru,
    NoRoom,
    S3Fifo,
    Sieve,
)
from tests.mechanisms.caching.naive import POLICIES

KEYS = st.integers(0, 11)
CALLS = 20_000
EXAMPLES, STEPS = 300, 80


class Caching(RuleBasedStateMachine):
    """Whom a policy evicts is up to it, so the model asks which are gone; all else it foresees."""

    calls = 0

    @initialize(capacity=st.integers(0, 12), policy=st.sampled_from([policy for policy, _ in POLICIES.values()]))
    def start(self, capacity, policy):
        self.cache, self.capacity, self.recency = Cache(capacity, policy()), capacity, []
        self.values, self.sizes, self.pins, self.counts = {}, {}, {}, [0, 0, 0]

    def used(self, key):
        self.recency = [other for other in self.recency if other != key] + [key]

    @rule(key=KEYS)
    def get(self, key):
        assert self.cache.get(key, "absent") == self.values.get(key, "absent")
        self.counts[key not in self.values] += 1
        if key in self.values:
            self.used(key)

    @rule(key=KEYS, value=st.integers(), size=st.integers(0, 6) | st.integers(0, 15))
    def put(self, key, value, size):
        in_use = sum(self.sizes[other] for other in self.pins if other != key)
        if size + in_use > self.capacity:
            with pytest.raises(EntryTooLarge if size > self.capacity else NoRoom) as refused:
                self.cache.put(key, value, size)
            assert isinstance(refused.value, DoesNotFit) and repr(key) in str(refused.value)
            return
        evicted = self.cache.put(key, value, size)
        assert key not in evicted and not evicted.keys() & self.pins.keys()
        if isinstance(self.cache.policy, Lru):
            free = [other for other in self.recency if other != key and other not in self.pins]
            assert list(evicted) == free[: len(evicted)]
        for number, other in enumerate(evicted):
            taken = sum(self.sizes.values()) - self.sizes.get(key, 0)
            assert taken + size > self.capacity, f"eviction {number} was needless"
            assert evicted[other] == self.forget(other)
        self.counts[2] += len(evicted)
        self.values[key], self.sizes[key] = value, size
        self.used(key)

    @rule(key=KEYS)
    def remove(self, key):
        if key in self.pins:
            with pytest.raises(EntryInUse, match=f"{key} is pinned {self.pins[key]} times"):
                self.cache.remove(key)
        elif key in self.values:
            assert self.cache.remove(key) == self.forget(key)
        else:
            with pytest.raises(KeyError):
                self.cache.remove(key)

    @rule(key=KEYS)
    def pin(self, key):
        if key in self.values:
            assert self.cache.pin(key) == self.values[key]
            self.pins[key] = self.pins.get(key, 0) + 1
        else:
            with pytest.raises(KeyError):
                self.cache.pin(key)

    @rule(key=KEYS)
    def unpin(self, key):
        if key not in self.pins:
            with pytest.raises(ValueError, match=f"{key} is not pinned"):
                self.cache.unpin(key)
            return
        self.cache.unpin(key)
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]

    def forget(self, key):
        del self.sizes[key]
        self.recency.remove(key)
        return self.values.pop(key)

    @invariant()
    def agrees(self):
        if not hasattr(self, "cache"):
            return
        Caching.calls += 1
        self.cache.check_invariants()
        assert set(self.cache) == self.values.keys() and len(self.cache) == len(self.values)
        assert [key in self.cache for key in range(12)] == [key in self.values for key in range(12)]
        assert self.cache.used == sum(self.sizes.values()) <= self.capacity
        assert [self.cache.hits, self.cache.misses, self.cache.evictions] == self.counts


def test_caches_behave_as_the_model_does():
    Caching.calls = 0
    case = Caching.TestCase()
    case.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
    case.runTest()
    assert Caching.calls >= CALLS


@pytest.mark.parametrize("policy", [Fifo, Lru, Clock, Lfu, S3Fifo, Sieve])
@pytest.mark.parametrize("capacity", [0, 1])
def test_hardly_any_room(policy, capacity):
    cache = Cache(capacity, policy())
    assert cache.put("empty", "takes nothing", size=0) == {} and "empty" in cache
    assert cache.remove("empty") == "takes nothing"
    if capacity:
        assert cache.put("a", 1) == {} and cache.put("b", 2) == {"a": 1} and cache.put("b", 3) == {}
        assert cache.get("b") == 3 and cache.get("a") is None
        cache.pin("b")
        assert cache.put("b", 4) == {}, "who has pinned an entry may replace its value"
        with pytest.raises(NoRoom, match="'a' of size 1 and 1 in use are more than 1"):
            cache.put("a", 1)
    with pytest.raises(EntryTooLarge, match=f"larger than the whole cache of {capacity}"):
        cache.put("c", None, size=2)
    cache.check_invariants()
    assert cache.used == capacity and cache.evictions == capacity


def test_an_entry_that_grows_makes_others_leave_and_never_itself():
    cache = Cache(10, Lru())
    for key in "abc":
        cache.put(key, key, size=3)
    assert cache.put("a", "A", size=4) == {} and cache.used == 10
    assert cache.put("a", "AA", size=8) == {"b": "b", "c": "c"} and cache.used == 8
    with pytest.raises(EntryTooLarge):
        cache.put("a", "AAA", size=11)
    assert cache.get("a") == "AA"


def test_none_is_a_value_and_a_key():
    cache, absent = Cache(2, Sieve()), object()
    assert cache.get(None, absent) is absent
    cache.put(None, None)
    assert cache.get(None, absent) is None and (cache.hits, cache.misses) == (1, 1)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        Cache(-1, Lru())
    policy = Lru()
    first = Cache(1, policy)
    for keys in (0, 1):  # two caches with one policy would evict each other's keys
        with pytest.raises(ValueError, match=f"serves one cache, and this one holds {keys} keys"):
            Cache(1, policy)
        first.put("a", 1)
    cache = Cache(1, Lru())
    with pytest.raises(ValueError, match="a size is 0 or more, got -1"):
        cache.put("a", 1, size=-1)
    for size in (1.0, float("nan"), "1", None):
        with pytest.raises(TypeError, match="a size is a whole number"):
            cache.put("a", 1, size=size)
    with pytest.raises(TypeError, match="unhashable"):
        cache.put([], 1)
    cache.check_invariants()
    assert len(cache) == cache.used == 0


def test_memoization_of_a_recurrence_needs_each_value_once():
    """Fibonacci: 2·fib(n + 1) - 1 calls without a cache, n + 1 with one that has room for three."""
    calls = []

    def fib(n, cache):
        if (known := cache.get(n)) is not None:
            return known
        calls.append(n)
        value = n if n < 2 else fib(n - 1, cache) + fib(n - 2, cache)
        if cache.capacity:
            cache.put(n, value)
        return value

    counts = []
    for capacity in (0, 3, 100):
        calls.clear()
        assert fib(20, Cache(capacity, Lru())) == 6765
        counts.append(len(calls))
    assert counts[0] == 2 * 10946 - 1 and counts[1:] == [21, 21]


def test_invariants_see_every_kind_of_damage():
    def damaged(damage):
        cache = Cache(4, Lru())
        for key in "abc":
            cache.put(key, key)
        cache.pin("a")
        cache.check_invariants()
        damage(cache)
        with pytest.raises(AssertionError):
            cache.check_invariants()

    damaged(lambda cache: cache.policy.remove("b"))
    damaged(lambda cache: cache.policy.add("d"))
    damaged(lambda cache: cache._entries.pop("a"))
    damaged(lambda cache: setattr(cache, "used", 2))
    damaged(lambda cache: setattr(cache, "capacity", 2))
    damaged(lambda cache: cache._pins.update({"gone": 1}))
    damaged(lambda cache: cache._pins.subtract({"a": 1}))


def test_an_offer_that_has_no_place_is_not_held_and_neither_is_what_was():
    cache = Cache(10, Lru())
    assert cache.offer("a", 1, 4) == {} and cache.offer("b", 2, 8) == {"a": 1}
    assert cache.offer("b", 3, 11) == {} and "b" not in cache and cache.used == 0
    assert cache.offer("never", 4, 11) == {} and "never" not in cache
    cache.put("c", 5, 6), cache.pin("c")
    assert cache.offer("d", 6, 5) == {} and list(cache) == ["c"]
    with pytest.raises(EntryInUse):
        cache.offer("c", 7, 11)
    with pytest.raises(ValueError, match="0 or more"):
        cache.offer("c", 7, -1)
    assert cache.pin("c") == 5
    cache.check_invariants()
