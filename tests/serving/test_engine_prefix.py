"""Prefix caching saves tokens and changes none: what is computed is counted, what comes out is transformers' own."""

import copy
import itertools

import pytest

from minilib.mechanisms.caching import Fifo, Lru
from minilib.mechanisms.content_addressing import HashChain, block_key
from minilib.mechanisms.paging import FramePool
from minilib.serving.cache import prefix
from minilib.serving.cache.keeping_pool import KeepingPool
from minilib.serving.engine import Engine
from minilib.serving.llm import LLM
from minilib.serving.request import InvalidRequest, SamplingParams
from tests.serving.faults import interrupt_at
from tests.serving.served import Results, alone, engine, finish, greedy, likeliest, models, prompt, step

COUNT = 10
DESIGNS = ["hash", "radix"]
SYSTEM = prompt(48)

both = pytest.mark.parametrize("design", DESIGNS)


def watch_computed(served):
    """A list that grows by the number of tokens that each step computes."""
    seen, real = [], served._forward

    def forward(work, interrupts):
        seen.append(sum(count for _, count in work))
        return real(work, interrupts)

    served._forward = forward
    return seen


def ask(served, tokens, params=None, name="a"):
    """Serve one request by itself; (tokens of the first sample, cached_tokens, tokens computed)."""
    computed, cached = watch_computed(served), set()
    served.add_request(name, tokens, params or likeliest(COUNT))
    results = Results()
    for _ in range(len(tokens) + 50):
        outputs = served.step()
        cached |= {output.cached_tokens for output in outputs}
        results.take(outputs)
        served.check_invariants()
    assert not served.has_unfinished, "it is not let in"
    (cached,) = cached
    del served._forward
    assert served.cache.pool.num_used == 0
    return results.tokens[name, 0], cached, sum(computed)


CUTS = list(itertools.product([1, 2, 16, 64], [("recompute", 0), ("swap", 100), ("swap", 6)], [9, 1000]))


@both
@pytest.mark.parametrize("page_size, preemption, budget", CUTS)
def test_a_crowd_gets_what_transformers_generates(page_size, preemption, budget, design):
    """Three rounds: users of one system prompt, the same again, and their chats; with little room, and with much."""
    name, swap_pages = preemption
    texts = [SYSTEM[:33] + prompt(extra) for extra in (1, 2, 15, 16, 17)] + [SYSTEM[:33], SYSTEM[:32], SYSTEM[:5]]
    chats = [text + greedy(text, COUNT) + prompt(3) for text in texts]
    for slots in (80, 512):
        served = engine(
            -(-slots // page_size),
            page_size,
            num_swap_pages=swap_pages,
            preemption=name,
            max_batch_tokens=budget,
            prefix_cache=design,
        )
        for round_, prompts in enumerate([texts, texts, chats]):
            for number, text in enumerate(prompts):
                served.add_request(f"{round_}/{number}", text, likeliest(COUNT))
            results = finish(served)
            for number, text in enumerate(prompts):
                assert results.tokens[f"{round_}/{number}", 0] == greedy(text, COUNT)
        assert served.prefix.tokens_matched > (200 if slots == 512 and page_size < 64 else 0 if page_size < 64 else -1)


@both
@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("more", [0, 1])
def test_a_prompt_that_is_held_as_a_whole_still_computes_one_token(page_size, more, design):
    """Hits are alike on both sides of a page's border: the last token alone is computed."""
    length = 32 + more
    served = engine(60, page_size, prefix_cache=design)
    text = prompt(length)
    assert ask(served, text, likeliest(1)) == (greedy(text, 1), 0, length)
    assert ask(served, text, likeliest(1)) == (greedy(text, 1), length - 1, 1)
    assert ask(served, text) == (greedy(text, COUNT), length - 1, COUNT)
    assert served.prefix.index.evictions == 0
    assert len(served.prefix.index) == (length + COUNT - 1) // page_size


@both
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_a_chat_computes_what_is_new(page_size, design):
    served, text, known = engine(300, page_size, prefix_cache=design), prompt(20), 0
    for turn in range(5):
        answer, cached, computed = ask(served, text)
        assert answer == greedy(text, COUNT)
        assert cached == known // page_size * page_size
        assert computed == len(text) + COUNT - 1 - cached
        known = len(text) + COUNT - 1
        text = text + answer + prompt(3 + turn)


@both
def test_the_last_page_is_computed_anew_where_a_copy_of_it_has_no_room(design):
    """A pool of two pages, both held for the very prompt that comes."""
    served, text = engine(2, 16, prefix_cache=design), prompt(32)
    assert ask(served, text, likeliest(1)) == (greedy(text, 1), 0, 32)
    assert served.cache.pool.num_idle == 2
    assert ask(served, text, likeliest(1)) == (greedy(text, 1), 16, 16)


@both
def test_a_match_does_not_evict_what_it_matched(design):
    """Three of four pages are held for the prompt, and are those that leave first; it needs the fourth and no other."""
    served, text = engine(4, 16, prefix_cache=design, eviction=Fifo()), prompt(60)
    ask(served, text[:48], likeliest(1))
    ask(served, prompt(16), likeliest(1))
    assert served.cache.pool.num_idle == 4
    assert ask(served, text, likeliest(1)) == (greedy(text, 1), 48, 12)
    assert served.prefix.index.evictions == 1
    assert ask(served, text, likeliest(1)) == (greedy(text, 1), 48, 12)


def state(served):
    pool = served.cache.pool
    return list(pool.ref_counts), list(pool._free), set(pool.kept), pool.num_idle, list(served.prefix.index.policy)


@both
@pytest.mark.parametrize("reason", ["pages", "samples"])
def test_a_request_that_is_not_let_in_leaves_no_trace(reason, design):
    """It matches two pages, and the rest of it, or its samples, have no room."""
    served = engine(3, 16, prefix_cache=design, max_sequences=2)
    ask(served, SYSTEM[:32], likeliest(1))
    served.add_request("runs", prompt(15), likeliest(5))
    served.step()
    text, n = {"pages": (SYSTEM, 1), "samples": (SYSTEM[:32], 2)}[reason]
    served.add_request("waits", text, likeliest(1, n=n))
    before = state(served)
    assert served.scheduler._admit_next() is None
    assert state(served) == before
    (waiting,) = served.scheduler.waiting
    assert waiting.table.frames == [] and waiting.num_computed_tokens == 0 and waiting.num_cached_tokens is None
    assert served.prefix.num_matching(waiting) == 32
    served.check_invariants()
    assert finish(served).tokens["waits", 0] == greedy(text, 1)


@pytest.mark.parametrize("bits", [0, 2])
def test_a_collision_is_never_served(monkeypatch, bits):
    """Keys of so few bits that most of them collide; and a page of the same tokens as the one before it."""
    short = lambda *parts: bytes([block_key(*parts)[0] >> (8 - bits)])  # noqa: E731
    monkeypatch.setitem(prefix.DESIGNS, "hash", lambda policy: HashChain(policy, short))
    served = engine(60, 4, prefix_cache="hash")
    texts = [
        prompt(4) * 3 + prompt(2),
        prompt(4) * 3 + prompt(1),
        prompt(23),
        prompt(22),
        prompt(23) + prompt(5),
        prompt(40),
        prompt(23),
    ]
    for salt in ("", "other"):
        for text in texts:
            answer, cached, _ = ask(served, text, likeliest(COUNT, cache_salt=salt))
            assert answer == greedy(text, COUNT) and cached <= 24
    assert len(served.prefix.index) <= 2**bits
    assert served.prefix.tokens_matched > 0


@both
def test_a_salt_separates_tenants(design):
    served = engine(60, 4, prefix_cache=design)
    for salt, expected in [("", 0), ("a", 0), ("b", 0), ("a", 16), ("", 16), ("c", 0), ("b", 16)]:
        answer, cached, computed = ask(served, prompt(17), likeliest(COUNT, cache_salt=salt))
        assert answer == greedy(prompt(17), COUNT)
        assert (cached, computed) == (expected, 17 + COUNT - 1 - expected), salt
    with pytest.raises(InvalidRequest, match="cache_salt"):
        SamplingParams(cache_salt=None)


@both
def test_the_end_of_a_chain_leaves_first(design):
    served = engine(8, 4, prefix_cache=design)
    ask(served, prompt(24), likeliest(1))
    for pages, left in [(3, 20), (2, 12), (1, 8)]:
        ask(served, prompt(4 * pages, seed=pages), likeliest(1, cache_salt=str(pages)))
        served.add_request("held", prompt(24), likeliest(1))
        assert served.prefix.num_matching(served.scheduler.waiting[0]) == left
        served.abort("held")


@both
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_sequence_that_gave_way_finds_its_full_pages_again(preemption, design):
    served, results = engine(40, 4, num_swap_pages=40, preemption=preemption, prefix_cache=design), Results()
    computed = watch_computed(served)
    served.add_request("a", prompt(21), likeliest(COUNT, n=2))
    for _ in range(3):
        step(served, results)
    for sequence in list(served.scheduler.running):
        served.scheduler.preempt(sequence)
        served.check_invariants()
    assert sum(computed) == 21 + 2 * 2
    finish(served, results)
    lost = 0 if preemption == "swap" else 2 * (23 - 20)  # what was not in a full page
    assert sum(computed) == 21 + 2 * (COUNT - 1) + lost
    assert {results.tokens["a", sample] for sample in range(2)} == {greedy(prompt(21), COUNT)}


@both
def test_samples_and_requests_share_pages_and_an_abort_leaves_them_to_the_others(design):
    served, results = engine(60, 4, prefix_cache=design), Results()
    served.add_request("a", prompt(20), likeliest(COUNT, n=3))
    step(served, results)
    assert served.cache.pool.num_used == 5
    served.add_request("b", prompt(20) + prompt(2), likeliest(COUNT))
    step(served, results)
    assert served.cache.pool.num_used == 5 + 3 + 1, "one page for each sample and for the end of b"
    served.abort("a")
    served.check_invariants()
    assert served.cache.pool.num_used == 6
    served.add_request("c", prompt(20), likeliest(COUNT))
    step(served, results)
    assert served.cache.pool.num_used == 6 + 0, "c's last page was taken over, copied, and given back"
    finish(served, results)
    assert results.tokens["c", 0] == greedy(prompt(20), COUNT)
    assert results.tokens["b", 0] == greedy(prompt(20) + prompt(2), COUNT)


@both
def test_two_that_compute_the_same_at_once_share_pages_afterwards(design):
    served, results = engine(60, 4, prefix_cache=design), Results()
    for name in "abc":
        served.add_request(name, prompt(20), likeliest(COUNT))
    computed = watch_computed(served)
    step(served, results)
    assert computed == [60] and served.cache.pool.num_used == 5
    finish(served, results)
    assert {results.tokens[name, 0] for name in "abc"} == {greedy(prompt(20), COUNT)}


@both
def test_cached_tokens_are_reported_for_each_request(design):
    llm = LLM(models()[1], num_pages=60, page_size=4, prefix_cache=design)
    (first,) = llm.generate([prompt(20)], likeliest(3))
    assert [completion.cached_tokens for completion in first] == [0]
    found = llm.generate([prompt(20) + (1,), prompt(9), prompt(20)], likeliest(3, n=2))
    assert [[completion.cached_tokens for completion in one] for one in found] == [[20] * 2, [0] * 2, [19] * 2]
    assert {output.cached_tokens for output in llm.stream(prompt(20) + (1,), likeliest(3))} == {20}


@both
def test_cached_tokens_are_those_of_the_first_time_that_it_was_let_in(design):
    served = engine(40, 4, prefix_cache=design)
    ask(served, prompt(20)[:8], likeliest(1))
    served.add_request("a", prompt(20), likeliest(COUNT))
    served.step()
    served.scheduler.preempt(served.scheduler.running[0])
    (output,) = served.step()
    assert output.cached_tokens == 8
    finish(served)


def test_each_page_is_hashed_twice_at_most_however_long_a_sequence_is(monkeypatch):
    """Once when it is looked up, of which the first miss is the last, and once when it is full."""
    calls = []
    counted = lambda *parts: calls.append(parts) or block_key(*parts)  # noqa: E731
    monkeypatch.setitem(prefix.DESIGNS, "hash", lambda policy: HashChain(policy, counted))
    served = Engine(models()[1], 100, 4, prefix_cache="hash", max_batch_tokens=7)
    served.add_request("a", prompt(41), likeliest(30, n=2))
    while served.has_unfinished:
        served.step()
    assert len(calls) == 1 + 10 + 2 * 7
    del calls[:]
    served.add_request("b", prompt(41), likeliest(3))
    while served.has_unfinished:
        served.step()
    assert len(calls) == 10


def test_nothing_is_kept_unless_asked_for():
    served = engine(40, 4)
    assert type(served.cache.pool) is FramePool and served.prefix is None
    assert type(engine(40, 4, prefix_cache="hash").cache.pool) is KeepingPool
    for _ in range(2):
        assert ask(served, prompt(20)) == (greedy(prompt(20), COUNT), 0, 20 + COUNT - 1)
    assert served.cache.pool.num_free == 40


@both
def test_without_a_hit_as_many_pages_are_taken_and_given_back(design):
    """Step by step, of a pool that is too small for all."""
    used = []
    for options in ({}, {"prefix_cache": design}):
        served = engine(12, 4, **options)
        for seed in range(6):
            served.add_request(str(seed), prompt(9 + seed), likeliest(COUNT))
        taken = []
        while served.has_unfinished:
            served.step()
            taken.append((served.cache.pool.num_used, len(served.scheduler.running)))
        used.append(taken)
    assert used[0] == used[1]


@both
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_keeps_nothing_that_it_did_not_compute(design, error):
    served, results = engine(40, 4, prefix_cache=design), Results()
    served.add_request("a", prompt(20), likeliest(COUNT))
    layer = served.model.layers[1]
    real = layer.forward
    layer.forward = lambda *inputs: (_ for _ in ()).throw(error("in the middle"))
    try:
        with pytest.raises(error):
            served.step()
    finally:
        del layer.forward
    assert layer.forward == real
    served.check_invariants()
    assert len(served.prefix.index) == 0 and served.cache.pool.num_used == 0
    assert finish(served, results).tokens["a", 0] == greedy(prompt(20), COUNT)


@both
def test_an_interrupt_at_any_line_of_a_step_loses_nothing(design):
    caught, count, lines = 0, 1, 10**9
    while count <= lines:
        served, results = engine(14, 4, prefix_cache=design), Results()
        ask(served, prompt(20), likeliest(2))
        ask(served, prompt(17), likeliest(2))
        for name, text in (("a", prompt(20)), ("b", prompt(20) + prompt(5))):
            served.add_request(name, text, likeliest(4, n=2))
        with interrupt_at(count) as seen:
            try:
                results.take(served.step())
                lines = seen[0]
            except KeyboardInterrupt:
                caught += 1
        served.check_invariants()
        finish(served, results)
        assert {results.tokens["a", sample] for sample in range(2)} == {greedy(prompt(20), 4)}
        assert {results.tokens["b", sample] for sample in range(2)} == {greedy(prompt(20) + prompt(5), 4)}
        count += 61
    assert caught > 10


@both
@pytest.mark.parametrize("pack", [False, True])
def test_single_precision_and_packed_weights_change_no_token(design, pack):
    model = copy.deepcopy(models()[1]).float()
    served = Engine(model, 300, 16, max_batch_tokens=40, prefix_cache=design, pack=pack)
    texts = [SYSTEM[:33] + prompt(extra) for extra in (1, 2, 15, 16, 17)] + [SYSTEM, SYSTEM[:32]]
    for round_ in range(2):
        for number, text in enumerate(texts):
            served.add_request(f"{round_}/{number}", text, likeliest(COUNT))
        results = finish(served)
        for number, text in enumerate(texts):
            assert results.tokens[f"{round_}/{number}", 0] == greedy(text, COUNT)
    assert served.prefix.tokens_matched > 200


@both
def test_weights_that_change_need_a_cache_that_is_cleared(design):
    model = copy.deepcopy(models()[1])
    served = Engine(model, 64, 4, prefix_cache=design)
    served.add_request("a", prompt(20), likeliest(COUNT))
    served.step()
    assert served.prefix.clear() == 5, "a uses them"
    finish(served)
    model.layers.requires_grad_(False)
    for parameter in model.layers.parameters():
        parameter.mul_(-1.1)
    assert served.prefix.clear() == 0
    served.add_request("a", prompt(20), likeliest(COUNT))
    fresh = Engine(copy.deepcopy(model), 64, 4)
    fresh.add_request("a", prompt(20), likeliest(COUNT))
    assert finish(served).tokens == finish(fresh).tokens != {("a", 0): greedy(prompt(20), COUNT)}


def test_forks_that_are_drawn_differ_and_share_as_ever():
    params = SamplingParams(max_tokens=COUNT, temperature=1.5, seed=3, n=3)
    expected = alone(prompt(17), params)
    for design in DESIGNS:
        served = engine(30, 2, prefix_cache=design)
        for name in "ab":
            served.add_request(name, prompt(17), params)
            results = finish(served)
            assert [results.tokens[name, sample] for sample in range(3)] == expected


def used_policy():
    policy = Lru()
    policy.add("somebody else's")
    return policy


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prefix_cache": "tree"}, ValueError, "hash, radix"),
        ({"prefix_cache": True}, ValueError, "hash, radix"),
        ({"prefix_cache": "hash", "eviction": used_policy()}, ValueError, "1 keys"),
        ({"prefix_cache": "hash", "eviction": "lru"}, TypeError, "EvictionPolicy"),
        ({"eviction": Lru()}, ValueError, "prefix_cache"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        engine(**options)
