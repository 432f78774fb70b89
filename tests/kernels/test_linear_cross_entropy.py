"""Linear cross-entropy without a GPU: memory and products counted, chunks, errors; the chunk loop is that of a GPU."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minilib.kernels.cross_entropy.linear import (
    REDUCTIONS,
    SHARE,
    chunk_tokens,
    cost,
    linear_cross_entropy,
    reference,
)

VOCAB, HIDDEN = 131, 16


class Watch(TorchDispatchMode):
    """Counts calls by operator, and values of the largest memory seen as (…, vocabulary), that of `weight.T` apart."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.largest, self.calls = weight.untyped_storage().data_ptr(), 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for x in tree_iter((args, out)):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == VOCAB:
                memory = x.untyped_storage()  # of which x may be a part
                if memory.data_ptr() != self.weight:
                    self.largest = max(self.largest, memory.nbytes() // x.itemsize)
        return out


def layer(tokens: int, dtype: torch.dtype = torch.float32):
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype) / 4
    targets = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(2))
    targets[1::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def products(calls: Counter) -> int:
    return calls["mm"] + calls["addmm_"] + calls["addmm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [8, 63, 64, 65, 509])
def test_an_eighth_of_the_logits_is_all_that_exists(tokens, dtype):
    hidden, weight, targets = layer(tokens, dtype)
    with Watch(weight) as watch:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert 0 < watch.largest <= tokens * VOCAB / SHARE
    with Watch(weight) as unfused:
        reference(hidden, weight, targets).backward()
    assert unfused.largest >= tokens * VOCAB


def test_max_logits_overrides_the_eighth():
    hidden, weight, targets = layer(64)
    for max_logits in (VOCAB, 3 * VOCAB + 1, 64 * VOCAB):
        with Watch(weight) as watch:
            linear_cross_entropy(hidden, weight, targets, max_logits=max_logits).backward()
        assert max_logits - VOCAB < watch.largest <= max_logits


def test_only_gradients_that_are_wanted_are_computed():
    hidden, weight, targets = layer(64)
    for h, w, per_chunk in ((hidden, weight, 3), (hidden, weight.detach(), 2), (hidden.detach(), weight, 2)):
        with Watch(weight) as watch:
            linear_cross_entropy(h, w, targets)
        assert products(watch.calls) == SHARE * per_chunk
    with torch.no_grad(), Watch(weight) as watch:
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    assert products(watch.calls) == SHARE and not watch.calls["scatter_add_"]
    with Watch(weight) as watch:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert products(watch.calls) == SHARE * 3  # backward does none


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 63, 64, 65])
def test_on_a_cpu_it_agrees_with_torch(tokens, reduction):
    hidden, weight, targets = layer(tokens)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    logits = hidden.double() @ weight.double().T
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    assert torch.allclose(loss.double(), expected, rtol=1e-5, equal_nan=tokens == 0)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_reference_passes_gradcheck():
    hidden, weight, targets = layer(3, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: reference(h, w, targets), (hidden, weight))


def test_a_late_chunk_is_not_lost_in_the_sum_of_those_before():
    """1024 times -3/4: in bf16 the sum would stop growing where 3/4 is less than half its last bit."""
    hidden, weight = torch.ones(1024, 4, dtype=torch.bfloat16), torch.zeros(4, 4, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(1024, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, targets, reduction="sum", max_logits=4).backward()
    assert (weight.grad[0] == -768).all() and (weight.grad[1:] == 256).all()


def test_a_loss_scale_beyond_fp16_scales_gradients():
    hidden, weight, targets = layer(64, torch.float16)
    for x, scaled in zip(
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight)),
        torch.autograd.grad(2.0**17 * linear_cross_entropy(hidden, weight, targets), (hidden, weight)),
        strict=True,
    ):
        assert scaled.isfinite().all() and torch.allclose(scaled / 2**17, x, atol=1e-5)


def test_backward_may_come_twice_but_not_through_itself():
    hidden, weight, targets = layer(9)
    loss = linear_cross_entropy(hidden, weight, targets)
    first, second = (torch.autograd.grad(2 * loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once.*drop create_graph=True"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_autocast_does_not_reach_inside():
    hidden, weight, targets = layer(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets))
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


def test_chunks_are_even_and_as_few_as_the_bound_allows():
    assert chunk_tokens(8192, 128_256) == 1024
    assert chunk_tokens(8191, 128_256) == 911  # 8 chunks would exceed an eighth: 9, none of them tiny
    assert chunk_tokens(7, 10) == 1 and chunk_tokens(0, 10) == 0
    assert chunk_tokens(100, 10, max_logits=999) == 50 and chunk_tokens(100, 10, max_logits=1000) == 100
    for tokens in range(8, 300):
        chunk = chunk_tokens(tokens, 10)
        assert chunk <= tokens / SHARE and -(-tokens // chunk) <= 2 * SHARE - 1


def test_its_cost_counts_products_and_passes_over_logits_and_weight():
    tokens, hidden, vocab = 64, 16, 100
    both, none = cost(tokens, hidden, vocab), cost(tokens, hidden, vocab, hidden_grad=False, weight_grad=False)
    product, logits, weight, states = 2 * tokens * hidden * vocab, 2 * tokens * vocab, 2 * vocab * hidden, 2 * 64 * 16
    assert (both.flops, none.flops) == (3 * product, product)
    assert none.bytes == 2 * logits + 8 * weight + states
    assert both.bytes == 6 * logits + 8 * 2 * weight + (2 * 8 - 1) * 2 * weight + 3 * states
    assert (both.calls, none.calls) == (8 * 5, 8 * 2)
    assert cost(tokens, hidden, vocab, max_logits=tokens * vocab).calls == 5


STATES, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, -100, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": STATES.double()}, TypeError, "hidden is torch.float64: convert it"),
        ({"weight": WEIGHT.half()}, TypeError, "hidden is torch.float32 and weight is torch.float16"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"hidden is \(3, 4\) and weight \(5, 3\)"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight \(vocab, hidden_size\); hidden is"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden is \(\) and weight"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "hidden is on cpu and weight on meta"),
        ({"targets": TARGETS.int()}, TypeError, "targets in torch.int64"),
        ({"targets": TARGETS[:2]}, ValueError, "one target a row"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, r"linear_cross_entropy wants targets in \[0, 5\)"),
        ({"reduction": "none"}, ValueError, "linear_cross_entropy has the reductions 'mean', 'sum', not 'none'"),
        ({"max_logits": 4}, ValueError, "max_logits=4 has no room for the 5 logits of one token"),
        ({"interpret": True}, ValueError, "TRITON_INTERPRET=1"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**({"hidden": STATES, "weight": WEIGHT, "targets": TARGETS} | change))
