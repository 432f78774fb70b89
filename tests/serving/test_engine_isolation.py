"""Whatever one request computes, writes or is interrupted at, every other one gets what it would get alone.

The random test below runs 21,600 operations in an ordinary run; with INFRA_LONG=1 in the environment 30 times as many.
"""

import functools
import itertools
import random

import pytest
import torch

from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.serving.cache import paged_attention
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.serving import faults
from tests.serving.faults import CONFIG, PoisonedPool, interrupted_step
from tests.serving.random_operations import LEAST_OPERATIONS, OPERATIONS, RandomOperations, served_alone
from tests.serving.served import finish, likeliest

PREEMPTIONS = {"recompute": 0, "swap": 60}
RUNS = list(itertools.product([1, 3, 16], PREEMPTIONS, ["gathered", "in place"], [0, 1, 2]))
SHARES = {"step": 58, "add": 14, "abort": 2, "preempt": 14, "interrupt": 12}
LONGEST = 30  # slots that any request below needs
SPOILT = (faults.NAN, faults.INF, faults.NOTHING, faults.ONE_INF, faults.ONE_NAN)  # nothing can be chosen behind them


@functools.cache
def requests():
    """(prompt, params): half of the prompts hold a token that does harm, and any of them may be generated."""
    kinds, chosen = random.Random(1), []
    for length in [1, 2, 3, 4, 7, 8, 9, 15] * 6:
        text = [kinds.randrange(8, CONFIG.vocab_size) for _ in range(length)]
        if kinds.random() < 0.5:
            text[kinds.randrange(length)] = kinds.randrange(8)
        heat, top_k, top_p = kinds.choice([0, 1e-30, 0.8, 2.0]), kinds.choice([0, 5]), kinds.choice([1.0, 0.9])
        count, n = kinds.choice([1, 2, 5, 9, 15]), kinds.choice([1, 1, 2, 3])
        stop = kinds.choice([(), (faults.Tokenizer().decode([25]), faults.Tokenizer().decode([30, 31]))])
        chosen.append((tuple(text), SamplingParams(count, heat, top_k, top_p, length + count, n, stop)))
    return chosen


@functools.cache
def expected(kind):
    return served_alone(Engine(faults.model(), 200, 16, tokenizer=faults.Tokenizer()), *requests()[kind])


def crowded(page_size, preemption, seed):
    """Random operations on an engine with little room, whose pages hold NaN wherever nobody wrote."""
    choices = random.Random(f"{page_size}/{preemption}/{seed}")
    served = Engine(
        faults.model(),
        -(-LONGEST // page_size) + choices.choice([0, 2, 9]),
        page_size,
        PREEMPTIONS[preemption] // page_size,
        max_batch_tokens=choices.choice([5, 17, 100]),
        max_sequences=choices.choice([3, 6]),
        preemption=preemption,
        tokenizer=faults.Tokenizer(),
    )
    PoisonedPool.watch(served)
    return RandomOperations(served, choices, requests(), expected, SHARES, {"interrupt": interrupted_step})


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page_size, preemption, way, seed", RUNS)
def test_any_order_of_operations_and_faults(monkeypatch, page_size, preemption, way, seed, record_property):
    monkeypatch.setattr(paged_attention, "IN_PLACE_PAGES", 1 if way == "in place" else 10**9)
    operations = crowded(page_size, preemption, seed)
    operations.run()
    record_property("operations", OPERATIONS)
    assert OPERATIONS * len(RUNS) >= LEAST_OPERATIONS
    done = operations.done
    assert min(done[name] for name in ("add", "abort", "preempt", "interrupted")) > 0
    assert min(done[f"ended by {reason}"] for reason in ("error", "length")) > 5


def test_requests_alone_end_for_every_reason_and_lose_no_text():
    outcomes = [one for kind in range(len(requests())) for one in expected(kind).values()]
    assert {one.reason for one in outcomes} == {"stop", "length", "error"}
    assert sum(one.reason == "error" and len(one.tokens) > 0 for one in outcomes) > 5, "in the middle of a text"
    assert sum(one.reason == "length" and "\ufffd" in one.text for one in outcomes) > 5, "tokens without text"
    assert all(not set(SPOILT).intersection(one.tokens[:-1]) for one in outcomes)


def single_precision(moe=None):
    """A model of random weights in fp32 whose token 5 is a NaN."""
    torch.manual_seed(3)
    shape = {**CONFIG.__dict__, "tie_embeddings": False, "num_layers": 2, "moe": moe}
    decoder = Decoder(type(CONFIG)(**shape)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    return decoder


def overflowing():
    """Finite weights whose products for a token of equal large numbers are beyond fp16."""
    decoder = single_precision()
    with torch.no_grad():
        decoder.layers[0].gate_up.weight.add_(18)
        decoder.layers[0].down.weight.mul_(0.01)
    return decoder


MODELS = {
    "fp32": lambda: single_precision(),
    "fp16": lambda: overflowing().half(),
    "bf16": lambda: single_precision().bfloat16(),
    "packed": lambda: single_precision(),
    "experts": lambda: single_precision(MoEConfig(6, 2, 24, num_shared_experts=1, gate="sigmoid")),
    "groups of experts": lambda: single_precision(MoEConfig(8, 2, 24, num_groups=4, top_groups=2, drop="probability")),
}
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "large": 6e4}


def logits_of_good(kind, value, way, monkeypatch, poison=None, other=(5,) * 20):
    """All logits of a request, beside another one that ends with its first step, and what came of both."""
    monkeypatch.setattr(paged_attention, "IN_PLACE_PAGES", 1 if way == "in place" else 10**9)
    decoder = MODELS[kind]()
    if value is not None:
        decoder.embed.weight.data[5] = value
    served, seen = Engine(decoder, 40, 4, pack=kind == "packed"), []
    if poison is not None:
        PoisonedPool.watch(served, poison)
    forward = served._forward

    def watched(work, interrupts):
        logits = forward(work, interrupts)
        rows = [sequence.request_id for sequence, count in work if count == sequence.num_uncomputed_tokens]
        seen.append(logits[rows.index("good")].clone())
        return logits

    served._forward = watched
    served.add_request("good", (9, 10, 11), likeliest(12))
    if other:
        served.add_request("other", other, likeliest(1))
    results = finish(served)
    assert len(results.tokens["good", 0]) == 12 and 5 not in results.tokens["good", 0]
    return torch.stack(seen), results


@pytest.mark.parametrize("way", ["gathered", "in place"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("value", VALUES)
def test_numbers_of_one_request_reach_no_other(monkeypatch, kind, value, way):
    """Bit by bit, if experts do not get other numbers of rows: the other's numbers do not matter, then and later."""
    if value == "large" and kind != "fp16":
        pytest.skip("finite in this dtype")
    good, _ = logits_of_good(kind, None, way, monkeypatch)
    bad, results = logits_of_good(kind, VALUES[value], way, monkeypatch)
    assert results.reasons["other", 0] == "error"
    if "experts" in kind:
        torch.testing.assert_close(bad, good, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(bad, good)


@pytest.mark.parametrize("way", ["gathered", "in place"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("other", [None, (12,) * 20], ids=["alone", "beside another"])
def test_what_pages_held_before_does_not_matter(monkeypatch, kind, way, other):
    clean, _ = logits_of_good(kind, None, way, monkeypatch, poison=0.0, other=other)
    assert clean.isfinite().all()
    for poison in VALUES.values():
        assert torch.equal(logits_of_good(kind, None, way, monkeypatch, poison, other)[0], clean)


@pytest.mark.parametrize("bad", SPOILT)
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1e-30}, {"top_k": 3}, {"top_p": 0.5}, {"n": 3}])
def test_a_request_whose_logits_cannot_be_used_ends_with_an_error(bad, params):
    served = Engine(faults.model(), 40, 4)
    served.add_request("bad", (9, bad), SamplingParams(**params))
    served.add_request("good", (9, 10), likeliest(5))
    outputs = served.step()
    served.check_invariants()
    ended = [output for output in outputs if output.request_id == "bad"]
    assert [(one.sample, one.token_id, one.finish_reason) for one in ended] == [
        (sample, None, "error") for sample in range(params.get("n", 1))
    ]
    assert all("logits behind 2 tokens hold NaN, +inf, or −inf alone" in one.error for one in ended)
    assert list(served.requests) == ["good"] and len(finish(served).tokens["good", 0]) == 4


def test_a_key_that_is_not_finite_leaves_the_keys_before_it_alone():
    """A prefix may come to be shared: its keys and values are those that it has without what follows."""
    caches = []
    for text in ((9, 10, 11, 12), (9, 10, 11, 12, 5, 13)):
        decoder = single_precision()
        decoder.embed.weight.data[5] = float("nan")
        served = Engine(decoder, 10, 4)
        served.add_request("a", text, likeliest(1))
        served.step()
        caches.append(torch.cat((served.cache.k[:, 0], served.cache.v[:, 0])))
    torch.testing.assert_close(*caches, rtol=1e-5, atol=1e-5)
