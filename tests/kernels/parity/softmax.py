"""Softmax: widths around powers of two, wide rows, strides, infinities, gradients."""

from functools import partial

import torch

from minilib.kernels.rowwise import softmax as op
from tests.kernels.place import DTYPES, Place, assert_close

WIDTHS = (1, 2, 15, 16, 17, 127, 129, 1000)


def agrees(place: Place, dtype: str, shape: tuple[int, ...], strided: bool = False, scale: float = 4.0) -> None:
    x = place.random(*shape, dtype=dtype, scale=scale)
    x = (place.strided(x) if strided else x).requires_grad_()
    grad = place.random(*shape, dtype=dtype, seed=1)
    grad = place.strided(grad) if strided else grad
    wide = x.detach().double().requires_grad_()
    oracle = wide.softmax(dim=-1)
    (expected,) = torch.autograd.grad(oracle, wide, grad.double())
    ours = op.softmax(x, interpret=place.interpret)
    (dx,) = torch.autograd.grad(ours, x, grad)
    assert ours.dtype == dx.dtype == x.dtype and ours.is_contiguous()
    assert_close(ours, oracle, dtype)
    assert_close(dx, expected, dtype)


def rows_of_one_block_and_many(place: Place) -> None:
    for columns in (op.ONE_PASS, op.ONE_PASS + 1, op.ONE_PASS + op.TILE + 1):
        agrees(place, "fp32", (2, columns))


def infinities(place: Place) -> None:
    for columns in (5, op.ONE_PASS + 5):
        x = place.random(3, columns)
        x[0, : columns // 2 + 1] = -torch.inf  # the first block of a row may hold nothing else
        x[1, -1] = -torch.inf
        x[2] = -torch.inf
        ours = op.softmax(x, interpret=place.interpret)
        assert_close(ours[:2], x[:2].double().softmax(-1), "fp32")
        assert ours[2].isnan().all()


def nothing_to_do(place: Place) -> None:
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        x = place.random(*shape).requires_grad_()
        ours = op.softmax(x, interpret=place.interpret)
        ours.sum().backward()
        assert ours.shape == x.grad.shape == shape


CASES = {
    f"{dtype}, {columns} columns": partial(agrees, dtype=dtype, shape=(5, columns))
    for dtype in DTYPES
    for columns in WIDTHS
} | {
    "one dimension": partial(agrees, dtype="fp32", shape=(7,)),
    "four dimensions": partial(agrees, dtype="bf16", shape=(2, 3, 1, 33)),
    "strided": partial(agrees, dtype="fp16", shape=(3, 33), strided=True),
    "large values": partial(agrees, dtype="fp32", shape=(3, 33), scale=1e4),
    "wide rows": rows_of_one_block_and_many,
    "infinities": infinities,
    "nothing to do": nothing_to_do,
}
