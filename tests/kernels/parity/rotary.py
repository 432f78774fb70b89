"""Rotary embeddings: head sizes, strides between tokens and heads, angles whose halves differ, gradients."""

from functools import partial

import torch

from minilib.kernels.rowwise import rotary as op
from tests.kernels.place import DTYPES, Place, assert_close

HEADS = ((1, 2), (3, 6), (5, 16), (2, 34), (7, 96), (4, 128), (1, 256))


def agrees(place: Place, dtype: str, shape: tuple[int, ...], views=lambda x: x, grad_views=lambda x: x) -> None:
    """Angles are any numbers here: an op that assumed cos² + sin² = 1, or equal halves, would not agree."""
    x, grad = (place.random(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    cos, sin = (place.random(*shape[:-2], 1, shape[-1], dtype=dtype, seed=seed) for seed in (2, 3))
    wide = x.double().requires_grad_()
    expected = wide * cos.double() + wide.roll(shape[-1] // 2, dims=-1) * sin.double()
    (value,) = torch.autograd.grad(expected, wide, grad.double())
    ours = views(x).detach().requires_grad_()
    found = op.rotary(ours, cos, sin, interpret=place.interpret)
    (dx,) = torch.autograd.grad(found, ours, grad_views(grad))
    assert found.dtype == dx.dtype == x.dtype and found.is_contiguous() and found.shape == shape
    assert_close(found, expected, dtype)
    assert_close(dx, value, dtype)


def cut_out(x: torch.Tensor) -> torch.Tensor:
    """The same values as heads of a wider projection, in rows of a longer batch, all else NaN."""
    *leading, heads, head_dim = x.shape
    room = torch.full((*leading, heads + 5, head_dim), torch.nan, dtype=x.dtype, device=x.device)
    room[..., 2 : 2 + heads, :] = x
    return room[..., 2 : 2 + heads, :]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """As attention has it: heads before tokens in memory."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def strided_angles(place: Place) -> None:
    x, (cos, sin) = place.random(3, 2, 8), (place.random(3, 1, 8, seed=seed) for seed in (1, 2))
    expected = op.rotary(x, cos, sin, interpret=place.interpret)
    for angles in ((place.strided(cos), sin), (cos, place.strided(sin))):
        assert torch.equal(op.rotary(x, *angles, interpret=place.interpret), expected)


def it_turns_back(place: Place) -> None:
    """With true angles the backward pass undoes the turn."""
    angles = place.random(6, 1, 16, scale=3.0)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    x = place.random(6, 4, 32, seed=1).requires_grad_()
    turned = op.rotary(x, cos, sin, interpret=place.interpret)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    assert_close(back, x, "fp32")
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), "fp32")


def nothing_to_do(place: Place) -> None:
    for shape in ((0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 4), (2, 0, 3, 8)):
        x = place.random(*shape).requires_grad_()
        angles = place.random(*shape[:-2], 1, shape[-1])
        found = op.rotary(x, angles, angles, interpret=place.interpret)
        found.sum().backward()
        assert found.shape == x.grad.shape == shape


CASES = {
    f"{dtype}, {heads} heads of {head_dim}": partial(agrees, dtype=dtype, shape=(2, 3, heads, head_dim))
    for dtype in DTYPES
    for heads, head_dim in HEADS
} | {
    "no tokens' dimension": partial(agrees, dtype="fp32", shape=(3, 8)),
    "flat tokens": partial(agrees, dtype="bf16", shape=(37, 3, 8)),
    "five dimensions": partial(agrees, dtype="bf16", shape=(2, 3, 2, 3, 8)),
    "more than one program": partial(agrees, dtype="fp32", shape=(2, 9, 7, 34)),
    "cut out of a projection": partial(agrees, dtype="bf16", shape=(2, 9, 3, 16), views=cut_out, grad_views=transposed),
    "transposed": partial(agrees, dtype="fp16", shape=(2, 9, 3, 16), views=transposed, grad_views=cut_out),
    "five dimensions, cut out": partial(agrees, dtype="fp32", shape=(2, 3, 2, 3, 8), views=cut_out),
    "gaps between heads": lambda place: agrees(place, "fp32", (2, 9, 3, 16), views=place.strided),
    "last dimension strided": partial(agrees, dtype="fp32", shape=(2, 9, 3, 8), views=lambda x: x.mT.contiguous().mT),
    "strided angles": strided_angles,
    "it turns back": it_turns_back,
    "nothing to do": nothing_to_do,
}
