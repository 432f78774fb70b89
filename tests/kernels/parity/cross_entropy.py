"""Cross-entropy: vocabularies around powers of two and blocks, ignored and wrong targets, strides, infinities."""

import warnings
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from minilib.kernels.cross_entropy import logits as op
from tests.kernels.place import DTYPES, Place, assert_close

BLOCK = op.LANES * op.DEPTH
VOCABS = (1, 2, 5, 31, 32, 33, 129, 1000, op.LANES - 1, op.LANES, op.LANES + 1, BLOCK - 1, BLOCK, BLOCK + 1)
IGNORED = -100


def targets_for(place: Place, logits: torch.Tensor, ignored: str = "some") -> torch.Tensor:
    """Random targets, the last column among them; of three or more, some are ignored, or all."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    flat = torch.randint(vocab, (shape.numel(),), generator=torch.Generator().manual_seed(7))
    flat[:1] = vocab - 1
    if ignored != "none":
        flat[2 if ignored == "some" else 0 :: 3 if ignored == "some" else 1] = IGNORED
    return flat.view(shape).to(place.device)


def oracle(logits: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
    loss = F.cross_entropy(logits.double().reshape(targets.numel(), -1), targets.reshape(-1), **options)
    return loss.view(targets.shape) if options.get("reduction") == "none" else loss


def compare(place: Place, x: torch.Tensor, targets: torch.Tensor, dtype: str, reduction: str = "none") -> None:
    """Loss and gradient, with an incoming gradient that differs by row."""
    x = x.detach().requires_grad_()
    expected = oracle(x, targets, reduction=reduction)
    ours = op.cross_entropy(x, targets, reduction=reduction, interpret=place.interpret)
    grad = place.random(*ours.shape, 2, seed=1)[..., 0]  # a stride of 2, if it has any
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    (dx,) = torch.autograd.grad(ours, x, grad)
    assert ours.dtype == torch.float32 and dx.dtype == x.dtype
    assert_close(ours, expected, "fp32")
    assert_close(dx, wanted, dtype)


def agrees(place: Place, dtype: str, shape: tuple[int, ...], scale: float = 4.0) -> None:
    x = place.random(*shape, dtype=dtype, scale=scale)
    compare(place, x, targets_for(place, x), dtype)


def reductions(place: Place) -> None:
    x = place.random(7, 33)
    for reduction in op.REDUCTIONS:
        for ignored in ("none", "some"):
            compare(place, x, targets_for(place, x, ignored), "fp32", reduction)


def everything_ignored(place: Place) -> None:
    x = place.random(4, 33).requires_grad_()
    for reduction in op.REDUCTIONS:
        targets = targets_for(place, x, "all")
        ours = op.cross_entropy(x, targets, reduction=reduction, interpret=place.interpret)
        (dx,) = torch.autograd.grad(ours.sum(), x)
        assert ours.isnan() if reduction == "mean" else not ours.any()
        assert not dx.any()


def another_index_ignored(place: Place) -> None:
    x = place.random(5, 9)
    targets = torch.tensor([0, 3, 3, 8, 1]).to(place.device)
    ours = op.cross_entropy(x, targets, ignore_index=3, interpret=place.interpret)
    assert_close(ours, oracle(x, targets, ignore_index=3), "fp32")


def strides(place: Place) -> None:
    x = place.random(4, 70, dtype="bf16")
    for view in (place.strided(x), x.T.contiguous().T, x[:1].expand(4, 70), x[:, ::2]):
        compare(place, view, targets_for(place, view), "bf16")
    targets = targets_for(place, x)
    compare(place, x, torch.stack([targets, torch.zeros_like(targets)], dim=1)[:, 0], "bf16")


def large_logits(place: Place) -> None:
    for columns in (70, BLOCK + 5):
        agrees(place, "fp32", (3, columns), scale=1e4)
        x = 1e4 + place.random(3, columns)  # nearly alike: the log-sum-exp as one fp32 number would be off by 5e-4
        compare(place, x, targets_for(place, x), "fp32")
        compare(place, -x, targets_for(place, x), "fp32")


def masked_vocabulary(place: Place) -> None:
    for columns in (70, 2 * BLOCK):
        x = place.random(4, columns)
        x[:, : columns // 2] = -torch.inf  # whole blocks may hold nothing else
        targets = torch.full((4,), columns - 1, device=place.device)
        targets[1] = IGNORED
        compare(place, x, targets, "fp32")
        targets[0] = 0  # costs infinity; its gradient is finite
        compare(place, x, targets, "fp32")


def not_numbers(place: Place) -> None:
    for columns in (5, BLOCK + 5):
        x = place.random(4, columns)
        x[0], x[1, 3], x[2, columns - 1], x[3] = -torch.inf, torch.inf, torch.nan, torch.nan
        x.requires_grad_()
        targets = torch.tensor([0, 1, 0, IGNORED], device=place.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of the interpreter: all-NaN, log 0, ÷ 0
            ours = op.cross_entropy(x, targets, reduction="none", interpret=place.interpret)
            (dx,) = torch.autograd.grad(ours.sum(), x)
        assert ours[:3].isnan().all() and dx[:3].isnan().all()
        assert ours[3] == 0 and not dx[3].any()


def wrong_targets(place: Place) -> None:
    for columns in (5, BLOCK + 5):
        x = place.random(4, columns).requires_grad_()
        targets = torch.tensor([0, -1, columns, 2**40], device=place.device)
        if place.device == "cpu":
            with pytest.raises(ValueError, match=r"targets in \[0, \d+\) or ignore_index -100; one is -1"):
                op.cross_entropy(x, targets, interpret=place.interpret)
            continue
        ours = op.cross_entropy(x, targets, reduction="none", interpret=place.interpret)
        (dx,) = torch.autograd.grad(ours.sum(), x)
        assert ours[0].isfinite() and ours[1:].isnan().all()
        assert dx[0].isfinite().all() and dx[1:].isnan().all()


def nothing_to_do(place: Place) -> None:
    for shape in ((0, 5), (2, 0, 3), (3, 0)):
        x = place.random(*shape).requires_grad_()
        targets = torch.full(shape[:-1], IGNORED, device=place.device)
        for reduction in op.REDUCTIONS:
            ours = op.cross_entropy(x, targets, reduction=reduction, interpret=place.interpret)
            (dx,) = torch.autograd.grad(ours.sum(), x)
            assert dx.shape == shape
            assert ours.isnan() if reduction == "mean" else not ours.any()


def a_second_derivative(place: Place) -> None:
    x = place.random(3, 5).requires_grad_()
    loss = op.cross_entropy(x, targets_for(place, x), interpret=place.interpret)
    with pytest.raises(RuntimeError, match="^cross_entropy is differentiable once"):
        torch.autograd.grad(loss, x, create_graph=True)


def gradient_in_place(place: Place) -> None:
    for dtype in DTYPES:
        for columns in (5, BLOCK + 5):
            x = place.random(3, columns, dtype=dtype).requires_grad_()
            targets = targets_for(place, x)
            expected = oracle(x, targets, reduction="none")
            (wanted,) = torch.autograd.grad(expected.sum(), x)
            dx = x.detach().clone()
            assert_close(op.losses_into_gradient(dx, targets, IGNORED, interpret=place.interpret), expected, "fp32")
            assert_close(dx, wanted, dtype)


CASES = {
    f"{dtype}, vocabulary {vocab}": partial(agrees, dtype=dtype, shape=(3, vocab))
    for dtype in DTYPES
    for vocab in VOCABS
} | {
    "vocabulary 32000": partial(agrees, dtype="bf16", shape=(3, 32_000)),
    "vocabulary 128256": partial(agrees, dtype="bf16", shape=(3, 128_256)),
    "vocabulary 151936": partial(agrees, dtype="bf16", shape=(3, 151_936)),
    "one dimension": partial(agrees, dtype="fp32", shape=(7,)),
    "four dimensions": partial(agrees, dtype="bf16", shape=(2, 3, 1, 33)),
    "reductions": reductions,
    "everything ignored": everything_ignored,
    "another index ignored": another_index_ignored,
    "strides": strides,
    "large logits": large_logits,
    "masked vocabulary": masked_vocabulary,
    "not numbers": not_numbers,
    "wrong targets": wrong_targets,
    "nothing to do": nothing_to_do,
    "a second derivative": a_second_derivative,
    "gradient in place": gradient_in_place,
}
