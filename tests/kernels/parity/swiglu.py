"""SwiGLU: widths around powers of two and around one program's block, strides, extreme gates, gradients."""

from functools import partial

import numpy as np
import torch

from minilib.kernels.rowwise import swiglu as op
from tests.kernels.place import DTYPES, Place, assert_close

WIDTHS = (1, 2, 15, 16, 17, 127, 129, 1000)


def agrees(place: Place, dtype: str, shape: tuple[int, ...], views=lambda x: x, scale: float = 2.0) -> None:
    """`shape` is the output's."""
    gate_up = place.random(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=scale)
    grad = place.random(*shape, dtype=dtype, seed=1)
    wide = gate_up.double().requires_grad_()
    gate, up = wide[..., : shape[-1]], wide[..., shape[-1] :]
    expected = gate / (1 + (-gate).exp()) * up
    (value,) = torch.autograd.grad(expected, wide, grad.double())
    ours = views(gate_up).detach().requires_grad_()
    found = op.swiglu(ours, interpret=place.interpret)
    (dx,) = torch.autograd.grad(found, ours, views(grad))
    assert found.dtype == dx.dtype == gate_up.dtype and found.is_contiguous() and found.shape == shape
    assert_close(found, expected, dtype)
    assert_close(dx, value, dtype)


def extreme_gates(place: Place) -> None:
    """exp(−gate) overflows on one side and vanishes on the other; neither may make a NaN."""
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4], device=place.device)
    gate_up = torch.cat((gate, torch.full_like(gate, 3.0))).requires_grad_()
    with np.errstate(over="ignore"):  # the interpreter computes in NumPy
        found = op.swiglu(gate_up, interpret=place.interpret)
        found.sum().backward()
    assert_close(found, gate.clamp(min=0) * 3, "fp32")
    on = (gate > 0).float() + 0.5 * (gate == 0)
    assert_close(gate_up.grad, torch.cat((3 * on, gate.clamp(min=0))), "fp32")


def it_is_rounded_once(place: Place) -> None:
    """In fp16: the interpreter cuts bf16 off where a GPU rounds it."""
    gate_up = place.random(50, 40, dtype="fp16", scale=2.0)
    gate, up = gate_up.double().chunk(2, -1)
    once = (gate * gate.sigmoid() * up).half()
    twice = (gate * gate.sigmoid()).half() * up.half()
    found = op.swiglu(gate_up, interpret=place.interpret)
    assert (found != once).double().mean() < 0.01 < (twice != once).double().mean()


def nothing_to_do(place: Place) -> None:
    for shape in ((0,), (0, 6), (5, 0), (2, 0, 4)):
        gate_up = place.random(*shape).requires_grad_()
        found = op.swiglu(gate_up, interpret=place.interpret)
        found.sum().backward()
        assert found.shape == (*shape[:-1], shape[-1] // 2) and gate_up.grad.shape == shape


CASES = {
    f"{dtype}, {columns} columns": partial(agrees, dtype=dtype, shape=(5, columns))
    for dtype in DTYPES
    for columns in WIDTHS
} | {
    "one dimension": partial(agrees, dtype="fp32", shape=(7,)),
    "four dimensions": partial(agrees, dtype="bf16", shape=(2, 3, 1, 33)),
    "several blocks a row": partial(agrees, dtype="bf16", shape=(5, 2 * op.WIDEST + 1)),
    "several programs of narrow rows": partial(agrees, dtype="fp32", shape=(2 * op.TILE // 16 + 3, 9)),
    "strided": lambda place: agrees(place, "fp16", (3, 33), views=place.strided),
    "strided blocks": lambda place: agrees(place, "fp32", (3, op.WIDEST + 1), views=place.strided),
    "transposed": partial(agrees, dtype="fp32", shape=(5, 6), views=lambda x: x.mT.contiguous().mT),
    "extreme gates": extreme_gates,
    "rounding": it_is_rounded_once,
    "nothing to do": nothing_to_do,
}
