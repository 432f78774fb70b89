"""Rotary embeddings without a GPU: what they cost, what they refuse, and plain torch where there is no kernel."""

import math

import pytest
import torch

from minilib.kernels.rowwise.rotary import cost, reference, rotary
from minilib.kernels.workbench.dispatch import as_heads

X, ANGLES = torch.ones(3, 2, 4), torch.ones(3, 1, 4)


def test_on_a_cpu_it_is_the_reference_and_differentiable():
    x, cos, sin = torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    assert torch.equal(rotary(x, cos, sin), reference(x, cos, sin))
    rotary(x, cos, sin)[0, 0, 0].backward()
    assert x.grad[0, 0].count_nonzero() == 2  # a value and its partner


def test_the_reference_is_a_turn_of_pairs_and_passes_gradcheck():
    angle = torch.tensor([0.3, 1.1], dtype=torch.float64)
    cos, sin = angle.cos().repeat(2)[None], torch.cat((-angle.sin(), angle.sin()))[None]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    turned = reference(x, cos, sin)
    for pair in range(2):
        expected = torch.complex(x[:, pair], x[:, pair + 2]) * torch.polar(torch.tensor(1.0).double(), angle[pair])
        assert torch.allclose(torch.complex(turned[:, pair], turned[:, pair + 2]), expected)
    assert torch.autograd.gradcheck(reference, (x, cos, sin))


def test_a_quarter_turn_takes_the_first_half_to_the_second():
    quarter = torch.full((1,), math.pi / 2)
    cos, sin = quarter.cos().repeat(2)[None], torch.cat((-quarter.sin(), quarter.sin()))[None]
    assert torch.allclose(rotary(torch.tensor([[1.0, 0.0]]), cos, sin), torch.tensor([[0.0, 1.0]]), atol=1e-6)


def test_heads_are_read_where_they_lie():
    """Cut out of a fused projection, or transposed as attention hands gradients back: views, whatever their strides."""
    cut_out = torch.zeros(2, 5, 9, 16)[:, :, 2:6]
    for x in (cut_out, cut_out[0], cut_out.transpose(1, 2), cut_out[:, 1:4], cut_out[0, 0], cut_out[0, 0, 0]):
        heads = as_heads(x)
        assert heads.dim() == 4 and heads.data_ptr() == x.data_ptr() and heads.stride(-1) == 1
        assert torch.equal(heads.reshape(x.shape), x)


def test_its_cost_is_each_tensor_once():
    assert cost(10, 4, 64, "bf16").bytes == 2 * (2 * 10 * 4 * 64 + 2 * 10 * 64)
    assert cost(10, 4, 64, "fp32").bytes == 2 * cost(10, 4, 64, "bf16").bytes
    assert cost(10, 4, 64).flops == 3 * 10 * 4 * 64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.double(), ANGLES.double(), ANGLES.double()), TypeError, r"x is torch.float64: convert it"),
        ((X.bfloat16(), ANGLES, ANGLES), TypeError, r"x is torch.bfloat16 and cos is torch.float32: convert one"),
        ((X, ANGLES, [1.0]), TypeError, "sin is list"),
        ((X, ANGLES, ANGLES.to("meta")), ValueError, "sin on meta"),
        ((torch.ones(4), ANGLES, ANGLES), ValueError, r"x \(..., heads, head_dim\) with an even head_dim, got \(4,\)"),
        ((torch.ones(3, 2, 5), ANGLES, ANGLES), ValueError, r"even head_dim, got \(3, 2, 5\)"),
        ((X, ANGLES[:, 0], ANGLES), ValueError, r"must be \(3, 1, 4\) for x \(3, 2, 4\), got \(3, 4\)"),
        ((X, ANGLES, ANGLES[:1]), ValueError, r"and \(1, 1, 4\): expand them"),
        ((X, ANGLES.expand(3, 2, 4), ANGLES), ValueError, r"must be \(3, 1, 4\)"),
        ((X, ANGLES, ANGLES.clone().requires_grad_()), ValueError, r"no gradient for cos and sin: .*sin.detach\(\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rotary(*arguments)


def test_the_interpreter_must_have_been_switched_on():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        rotary(X, ANGLES, ANGLES, interpret=True)
