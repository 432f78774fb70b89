"""Linear cross-entropy: tokens around chunk boundaries, ignored targets, gradients wanted and not, strides."""

from functools import partial

import pytest
import torch

from minilib.kernels.cross_entropy import linear as op
from tests.kernels.parity.cross_entropy import IGNORED, oracle, targets_for
from tests.kernels.place import DTYPES, Place, assert_close

CHUNK = 8
TOKENS = tuple(k * CHUNK + off for k in (1, 2, 3) for off in (-1, 0, 1))


def layer(place: Place, tokens: int, vocab: int, dtype: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a weight that make logits of about 1."""
    hidden_size = 24
    weight = place.random(vocab, hidden_size, dtype=dtype, seed=1, scale=hidden_size**-0.5)
    return place.random(tokens, hidden_size, dtype=dtype), weight


def compare(place: Place, hidden, weight, targets, dtype: str, wanted=(True, True), **options) -> None:
    """Loss and wanted gradients, with an incoming gradient that is not 1."""
    hidden, weight = (x.detach().requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True))
    sources = [x for x in (hidden, weight) if x.requires_grad]
    reduction = options.get("reduction", "mean")
    expected = oracle(hidden.double() @ weight.double().T, targets, reduction=reduction)
    ours = op.linear_cross_entropy(hidden, weight, targets, interpret=place.interpret, **options)
    assert ours.dtype == torch.float32 and ours.requires_grad == any(wanted)
    assert_close(ours, expected, dtype)
    times = 10.0 if reduction == "mean" else 1.0  # a gradient divided by the count would pass for its smallness
    for x, theirs in zip(sources, torch.autograd.grad(times * expected, sources), strict=True):
        (grad,) = torch.autograd.grad(times * ours, x, retain_graph=True)
        assert grad.dtype == x.dtype
        assert_close(grad, theirs, dtype)


def agrees(
    place: Place, dtype: str, tokens: int, vocab: int = 67, chunk: int | None = CHUNK, reduction: str = "sum"
) -> None:
    hidden, weight = layer(place, tokens, vocab, dtype)
    targets = targets_for(place, hidden @ weight.T)
    max_logits = chunk and chunk * vocab + vocab // 2
    compare(place, hidden, weight, targets, dtype, reduction=reduction, max_logits=max_logits)


def chunks_by_default(place: Place) -> None:
    for tokens in TOKENS[:4]:
        agrees(place, "fp32", tokens, chunk=None)


def wanted_gradients(place: Place) -> None:
    hidden, weight = layer(place, 17, 67)
    targets = targets_for(place, hidden @ weight.T)
    for wanted in ((True, False), (False, True), (False, False)):
        if any(wanted):
            compare(place, hidden, weight, targets, "fp32", wanted)
        loss = op.linear_cross_entropy(hidden, weight, targets, interpret=place.interpret)
        assert not loss.requires_grad
        assert_close(loss, oracle(hidden.double() @ weight.double().T, targets), "fp32")


def shapes_and_strides(place: Place) -> None:
    hidden, weight = layer(place, 4, 67)
    for states in (hidden.view(2, 1, 2, 24), hidden[0], place.strided(hidden), hidden.T.contiguous().T):
        for rows in (place.strided(weight), weight.T.contiguous().T):
            compare(place, states, rows, targets_for(place, states @ rows.T), "fp32", reduction="sum")
    targets = targets_for(place, hidden @ weight.T)
    alternate = torch.stack([targets, torch.zeros_like(targets)], dim=1)[:, 0]
    compare(place, hidden, weight, alternate, "fp32", reduction="sum")


def everything_ignored(place: Place) -> None:
    for tokens in (0, 9):
        hidden, weight = (x.requires_grad_() for x in layer(place, tokens, 67))
        targets = torch.full((tokens,), IGNORED, device=place.device)
        for reduction in op.REDUCTIONS:
            ours = op.linear_cross_entropy(hidden, weight, targets, reduction=reduction, interpret=place.interpret)
            gradients = torch.autograd.grad(ours, (hidden, weight))
            assert ours.isnan() if reduction == "mean" else ours == 0
            assert not any(grad.any() for grad in gradients)


def wrong_targets(place: Place) -> None:
    hidden, weight = layer(place, 9, 67)
    targets = torch.tensor([0, 1, 2, 3, 67, 5, 6, 7, 8], device=place.device)
    if place.device == "cpu":
        with pytest.raises(ValueError, match=r"linear_cross_entropy wants targets in \[0, 67\).*; one is 67"):
            op.linear_cross_entropy(hidden, weight, targets, interpret=place.interpret)
    else:
        assert op.linear_cross_entropy(hidden, weight, targets, interpret=place.interpret).isnan()


CASES = (
    {
        f"{dtype}, {tokens} tokens in chunks of {CHUNK}": partial(agrees, dtype=dtype, tokens=tokens)
        for dtype in DTYPES
        for tokens in TOKENS
    }
    | {f"{dtype}, mean": partial(agrees, dtype=dtype, tokens=17, reduction="mean") for dtype in DTYPES}
    | {
        "one token": partial(agrees, dtype="fp32", tokens=1),
        "a vocabulary of one": partial(agrees, dtype="fp32", tokens=9, vocab=1),
        "a vocabulary of 5000": partial(agrees, dtype="bf16", tokens=9, vocab=5000),
        "chunks by default": chunks_by_default,
        "wanted gradients": wanted_gradients,
        "shapes and strides": shapes_and_strides,
        "everything ignored": everything_ignored,
        "wrong targets": wrong_targets,
    }
)
