"""RMSNorm: widths around powers of two and around the widest row of one pass, heads, strides, residuals, gradients."""

from functools import partial

import torch

from minilib.kernels.rowwise import rms_norm as op
from tests.kernels.place import DTYPES, Place, assert_close

WIDTHS = (1, 2, 15, 16, 17, 129)
EPS = 1e-3  # large enough that forgetting it, or adding it outside the root, shows


def oracle(x, weight, residual=None, eps=EPS):
    """Written out, for float64: (y, h). That h is rounded to the dtype is left out; tolerances allow for it."""
    h = x if residual is None else x + residual
    return h * weight / (h.square().mean(-1, keepdim=True) + eps).sqrt(), h


def agrees(
    place: Place, dtype: str, shape: tuple[int, ...], residual: bool = False, scale: float = 1.0,
    first=lambda x: x, second=lambda x: x,
) -> None:  # fmt: skip
    """`first` makes views of x and of y's gradient, `second` of the residual and of h's: strides of their own."""
    x, added = first(place.random(*shape, dtype=dtype, scale=scale)), place.random(*shape, dtype=dtype, seed=2)
    tensors = [x, place.random(*shape[-1:], dtype=dtype, seed=1), *([second(scale * added)] if residual else [])]
    grads = [first(place.random(*shape, dtype=dtype, seed=3)), second(place.random(*shape, dtype=dtype, seed=4))]
    wide = [x.double().requires_grad_() for x in tensors]
    ours = [x.detach().requires_grad_() for x in tensors]
    grads = grads[: 1 + residual]
    expected = oracle(*wide)[: 1 + residual]
    found = op.rms_norm(*ours, eps=EPS, interpret=place.interpret)
    found = found if residual else (found,)
    expected_grads = torch.autograd.grad(expected, wide, [grad.double() for grad in grads])
    found_grads = torch.autograd.grad(found, ours, grads)
    for name, y, value in zip("yh", found, expected, strict=False):
        assert y.dtype == DTYPES[dtype] and y.is_contiguous() and y.shape == shape, name
        assert_close(y, value, dtype)
    for x, grad, value in zip(tensors, found_grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert_close(grad, value, dtype, times=2)  # of a sum rounded to the dtype, which is what was normalised


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with the last dimension strided."""
    return x.mT.contiguous().mT


def heads_of_a_fused_projection(place: Place) -> None:
    """Read where they lie: tokens and heads at strides of their own, in a batch that is a view as well."""
    x = place.random(2, 7, 9, 24, dtype="bf16")[:, :5, 2:6, :16]
    weight, grad = place.random(16, dtype="bf16", seed=1), place.random(2, 5, 4, 16, dtype="bf16", seed=2)
    ours, wide = x.detach().requires_grad_(), x.double().requires_grad_()
    y, (expected, _) = op.rms_norm(ours, weight, eps=EPS, interpret=place.interpret), oracle(wide, weight.double())
    assert_close(y, expected, "bf16")
    (dx,), (value,) = torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, wide, grad.double())
    assert_close(dx, value, "bf16")


def either_output_alone(place: Place) -> None:
    """What a loss does not use has no gradient to hand back."""
    for output in (0, 1):
        tensors = [place.random(3, 17, seed=0), place.random(17, seed=1), place.random(3, 17, seed=2)]
        grad = place.random(3, 17, seed=3)
        ours, wide = [x.requires_grad_() for x in tensors], [x.detach().double().requires_grad_() for x in tensors]
        op.rms_norm(*ours, eps=EPS, interpret=place.interpret)[output].backward(grad)
        oracle(*wide)[output].backward(grad.double())
        for x, value in zip(ours, wide, strict=True):
            assert_close(x.grad, torch.zeros_like(value) if value.grad is None else value.grad, "fp32")


def the_sum_is_rounded_before_it_is_normalised(place: Place) -> None:
    """In fp16: the interpreter cuts bf16 off where a GPU rounds it."""
    x, residual = place.random(4, 33, dtype="fp16"), place.random(4, 33, dtype="fp16", seed=1)
    weight = place.random(33, dtype="fp16", seed=2)
    y, h = op.rms_norm(x, weight, residual, interpret=place.interpret)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, op.rms_norm(h, weight, interpret=place.interpret))


def every_run_is_the_same(place: Place) -> None:
    x, weight = place.random(300, 130).requires_grad_(), place.random(130, seed=1).requires_grad_()
    grad = place.random(300, 130, seed=2)
    runs = [torch.autograd.grad(op.rms_norm(x, weight, interpret=place.interpret), (x, weight), grad) for _ in "ab"]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def nothing_to_do(place: Place) -> None:
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        x, weight = place.random(*shape).requires_grad_(), place.random(shape[-1]).requires_grad_()
        y, h = op.rms_norm(x, weight, x, interpret=place.interpret)
        (y.sum() + h.sum()).backward()
        assert y.shape == h.shape == x.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros_like(weight))


CASES = {
    f"{dtype}, {columns} columns{', residual' if residual else ''}": partial(
        agrees, dtype=dtype, shape=(5, columns), residual=residual
    )
    for dtype in DTYPES
    for columns in WIDTHS
    for residual in (False, True)
} | {
    "one dimension": partial(agrees, dtype="fp32", shape=(7,)),
    "four dimensions": partial(agrees, dtype="bf16", shape=(2, 3, 1, 33), residual=True),
    "five dimensions": partial(agrees, dtype="bf16", shape=(2, 3, 1, 2, 33)),
    "many rows": partial(agrees, dtype="fp32", shape=(37, 1000), residual=True),
    "large values": partial(agrees, dtype="fp32", shape=(3, 33), scale=1e4),
    "widest row of one pass": partial(agrees, dtype="bf16", shape=(5, op.ONE_PASS), residual=True),
    "one pass forward, blocks backward": partial(agrees, dtype="fp32", shape=(5, 9000), residual=True),
    "blocks": partial(agrees, dtype="fp32", shape=(5, op.ONE_PASS + op.BLOCK + 1)),
    "blocks, residual": partial(agrees, dtype="fp16", shape=(5, op.ONE_PASS + 1), residual=True),
    "x strided": lambda place: agrees(place, "fp16", (3, 33), residual=True, first=place.strided),
    "residual strided": lambda place: agrees(place, "fp16", (3, 33), residual=True, second=place.strided),
    "x strided, blocks": lambda place: agrees(place, "fp32", (2, op.ONE_PASS + 1), residual=True, first=place.strided),
    "residual strided, blocks": lambda place: agrees(
        place, "fp32", (2, op.ONE_PASS + 1), residual=True, second=place.strided
    ),
    "transposed": partial(agrees, dtype="fp32", shape=(3, 5, 6), residual=True, first=transposed, second=transposed),
    "heads of a fused projection": heads_of_a_fused_projection,
    "either output alone": either_output_alone,
    "rounding": the_sum_is_rounded_before_it_is_normalised,
    "determinism": every_run_is_the_same,
    "nothing to do": nothing_to_do,
}
