"""Greedy tokens are those of transformers' generate, however the pages, the batch and the pool are cut."""

import copy

import pytest
import torch

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.serving.engine import Engine
from tests.model.oracle import logits
from tests.serving.served import (
    POSITIONS,
    Results,
    assert_idle,
    engine,
    finish,
    greedy,
    likeliest,
    models,
    prompt,
    step,
    watch_preemptions,
)

COUNT = 18
LENGTHS = {1: [1, 2, 3, 9], 2: [1, 2, 3, 4, 5], 16: [15, 16, 17, 31, 32, 33], 64: [1, 63, 64, 65]}
COMPOSITIONS = {
    "all at once": {},
    "one by one": {"max_sequences": 1},
    "in chunks": {"max_batch_tokens": 7},
    "one token a step": {"max_batch_tokens": 1},
    "two in chunks": {"max_batch_tokens": 16, "max_sequences": 2},
}


def pages_of(length, page_size, count=COUNT):
    """Pages of one request whose last token, as always, is never computed."""
    return -(-(length + count - 1) // page_size)


def serve(served, lengths, count=COUNT, every=0):
    """Add all, or one more every so many steps; every output must be what transformers generates."""
    results = Results()
    for length in lengths:
        served.add_request(str(length), prompt(length), likeliest(count))
        for _ in range(every):
            step(served, results)
    finish(served, results)
    for length in lengths:
        assert results.tokens[str(length), 0] == greedy(prompt(length), count), f"prompt of {length} tokens"
        assert results.reasons[str(length), 0] == "length"


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("page_size", LENGTHS)
def test_an_ample_pool_serves_what_transformers_generates(page_size, composition):
    lengths = LENGTHS[page_size]
    served = engine(sum(pages_of(n, page_size) for n in lengths), page_size, **COMPOSITIONS[composition])
    given_way = watch_preemptions(served)
    serve(served, lengths)
    assert given_way == []


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("page_size", LENGTHS)
def test_requests_that_join_later_change_nothing(page_size, every):
    serve(engine(300, page_size, max_batch_tokens=20), LENGTHS[page_size], every=every)


@pytest.mark.parametrize("spare", [0, 1, 2])
@pytest.mark.parametrize("page_size", LENGTHS)
def test_the_smallest_pools_serve_all_in_turn(page_size, spare):
    lengths = LENGTHS[page_size]
    served = engine(pages_of(max(lengths), page_size) + spare, page_size)
    given_way = watch_preemptions(served)
    serve(served, lengths)
    if page_size < 64:  # with 64 the small ones need no second page
        assert len(given_way) > 0


@pytest.mark.parametrize("composition", ["all at once", "in chunks", "two in chunks"])
@pytest.mark.parametrize("preemption, swap_pages", [("recompute", 0), ("swap", 500), ("swap", 3), ("swap", 0)])
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_who_gives_way_goes_on_with_the_same_tokens(page_size, preemption, swap_pages, composition):
    lengths = LENGTHS[page_size]
    served = engine(
        pages_of(max(lengths), page_size) + 1,
        page_size,
        num_swap_pages=swap_pages,
        preemption=preemption,
        **COMPOSITIONS[composition],
    )
    given_way = watch_preemptions(served)
    serve(served, lengths)
    assert len(given_way) > 0
    if preemption == "recompute" or not swap_pages:
        assert set(given_way) == {"waiting"}
    if swap_pages == 500:
        assert set(given_way) == {"swapped"}


def test_too_little_swap_space_swaps_some_and_recomputes_others():
    served = engine(24, 2, num_swap_pages=10, preemption="swap")
    given_way = watch_preemptions(served)
    serve(served, [1, 2, 3, 4, 5, 15, 16, 17])
    assert set(given_way) == {"swapped", "waiting"}


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_whoever_runs_may_give_way_at_any_step(preemption):
    """Forced, each running sequence in turn, half-prefilled ones too."""
    served, results = engine(80, 2, num_swap_pages=80, preemption=preemption, max_batch_tokens=9), Results()
    for length in (3, 4, 5, 16, 17):
        served.add_request(str(length), prompt(length), likeliest(COUNT))
    forced = half_prefilled = 0
    while served.has_unfinished:
        step(served, results)
        for _ in range(2 if forced < 40 else 0):
            if running := served.scheduler.running:
                half_prefilled += running[forced % len(running)].num_uncomputed_tokens > 1
                served.scheduler.preempt(running[forced % len(running)])
                served.check_invariants()
                forced += 1
    assert forced >= 40 and half_prefilled > 0
    assert all(results.tokens[str(n), 0] == greedy(prompt(n), COUNT) for n in (3, 4, 5, 16, 17))
    assert_idle(served)


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
@pytest.mark.parametrize("budget", [15, 16, 17])
def test_chunks_that_end_near_a_page_border(page_size, budget):
    serve(engine(200, page_size, max_batch_tokens=budget), [31, 32, 33, 63, 64, 65], count=3)


@pytest.mark.parametrize("page_size", [1, 16])
def test_single_precision_and_packed_weights_change_no_token(page_size):
    model = copy.deepcopy(models()[1]).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    serve(Engine(model, 300, page_size, max_batch_tokens=40), LENGTHS[16], every=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    serve(Engine(model, 300, page_size, max_batch_tokens=40, pack=True), LENGTHS[16], every=2)
    assert model.ops.compiled


@pytest.mark.parametrize("rows", [1, 8])
def test_a_model_that_is_updated_in_place_is_served_as_it_is_now(rows):
    """However many rows a step has, they meet one and the same weights."""
    model = copy.deepcopy(models()[1]).float()
    served = Engine(model, 64)
    serve(served, [9])
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(-1.1)
    fresh = Engine(copy.deepcopy(model), 64)
    found = []
    for one in (served, fresh):
        for number in range(rows):
            one.add_request(str(number), prompt(9 + number), likeliest(COUNT))
        found.append(finish(one).tokens)
    assert found[0] == found[1] and found[0]["0", 0] != greedy(prompt(9), COUNT)


def test_a_sequence_wastes_less_than_a_page():
    """Counted by hand at every step, while sequences of all phases run."""
    served, results = engine(64, 16, max_batch_tokens=24), Results()
    for length in LENGTHS[16]:
        served.add_request(str(length), prompt(length), likeliest(COUNT))
    most = 0
    while served.has_unfinished:
        step(served, results)
        running = served.scheduler.running
        computed = sum(sequence.num_computed_tokens for sequence in running)
        taken = served.cache.pool.num_used
        assert 0 <= taken * 16 - computed <= 15 * len(running)
        most = max(most, len(running))
    assert most > 1


def test_a_step_never_computes_more_than_its_budget_and_computes_nothing_twice():
    served, seen = engine(64, 16, max_batch_tokens=10), []
    real = served._forward

    def forward(work, interrupts):
        seen.append(sum(count for _, count in work))
        return real(work, interrupts)

    served._forward = forward
    serve(served, LENGTHS[16])
    assert max(seen) == 10
    assert sum(seen) == sum(LENGTHS[16]) + len(LENGTHS[16]) * (COUNT - 1)


@pytest.mark.parametrize("generated", [1, 2, 16])
def test_prompt_and_generated_tokens_are_as_many_as_the_model_has_positions(generated):
    served = engine(1000, 2)
    served.add_request("long", prompt(POSITIONS - generated), likeliest(1000))
    results = finish(served)
    assert results.reasons["long", 0] == "length"
    assert results.tokens["long", 0] == greedy(prompt(POSITIONS - generated), generated)


@pytest.mark.parametrize("page_size, num_pages", [(1, 20), (2, 10), (16, 2), (64, 1)])
def test_the_pool_s_slots_end_a_sequence(page_size, num_pages):
    slots = page_size * num_pages
    for length in (1, slots - 1, slots):
        served = engine(num_pages, page_size)
        served.add_request("long", prompt(length), likeliest(1000))
        served.add_request("other", prompt(2), likeliest(2))
        results = finish(served)
        assert results.tokens["long", 0] == greedy(prompt(length), slots + 1 - length)
        assert results.reasons["long", 0] == "length"
        assert results.tokens["other", 0] == greedy(prompt(2), 2)


def test_first_come_is_first_served():
    served = engine(pages_of(33, 16), 16)
    for name in "abcd":
        served.add_request(name, prompt(33, seed=ord(name)), likeliest(COUNT))
    results = finish(served)
    assert [name for name, _ in results.reasons] == list("abcd")


def test_a_stop_token_and_the_end_token_end_a_sequence_and_are_part_of_it():
    tokens = greedy(prompt(17), COUNT)
    place = next(i for i in range(4, COUNT) if tokens[i] not in tokens[:i])
    end = tokens[place]
    cases = {
        "stop token": (likeliest(COUNT, stop_token_ids=(end,)), None, "stop", tokens[: place + 1]),
        "end token": (likeliest(COUNT), end, "stop", tokens[: place + 1]),
        "ignored end token": (likeliest(COUNT, ignore_eos=True), end, "length", tokens),
        "both": (likeliest(COUNT, stop_token_ids=(end,), ignore_eos=True), end, "stop", tokens[: place + 1]),
        "at the last token": (likeliest(place + 1), end, "stop", tokens[: place + 1]),
    }
    for name, (params, eos, reason, expected) in cases.items():
        served = engine(eos_token_id=eos)
        served.add_request(name, prompt(17), params)
        results = finish(served)
        assert (results.tokens[name, 0], results.reasons[name, 0]) == (expected, reason), name


@pytest.mark.parametrize("composition", ["all at once", "in chunks", "one token a step"])
def test_a_mixture_of_experts_is_served_as_it_is_computed_naively(composition):
    moe = MoEConfig(6, 2, 24, num_shared_experts=1, gate="sigmoid")
    shape = {**models()[1].config.__dict__, "moe": moe}
    model = Decoder(ModelConfig(**shape)).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        for layer in model.layers:
            layer.moe.router.bias.uniform_(-0.1, 0.1, generator=generator)
    served, results = Engine(model, 30, 4, **COMPOSITIONS[composition]), Results()
    lengths, count = (1, 6, 11), 7
    for length in lengths:
        served.add_request(str(length), prompt(length), likeliest(count))
    finish(served, results)
    for length in lengths:
        text = list(prompt(length))
        for _ in range(count):
            text.append(logits(model, torch.tensor([text]))[0, -1].argmax().item())
        assert results.tokens[str(length), 0] == tuple(text[length:])
        assert len(set(text[length:])) > 1
