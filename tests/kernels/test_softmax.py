"""Softmax without a GPU: what it costs, what it refuses, and plain torch where there is no kernel."""

import pytest
import torch

from minilib.kernels.rowwise.softmax import cost, reference, softmax


def test_on_a_cpu_it_is_the_reference_and_differentiable():
    x = torch.randn(3, 5, requires_grad=True)
    assert torch.equal(softmax(x), reference(x))
    softmax(x)[0, 0].backward()
    assert x.grad[0].abs().sum() > 0


def test_the_reference_is_torchs_and_passes_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(reference(x), x.softmax(-1))
    assert torch.autograd.gradcheck(reference, x)


def test_its_cost_is_one_read_and_one_write():
    assert cost(10, 100, "bf16").bytes == 2 * 2 * 1000 and cost(10, 100, "fp32").bytes == 2 * 4 * 1000
    assert cost(10, 100).flops == 5000


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), TypeError, r"x is torch.float64: convert it"),
        (torch.zeros(3, dtype=torch.int32), TypeError, r"x is torch.int32"),
        ([1.0], TypeError, "x is list"),
        (torch.tensor(1.0), ValueError, r"has none: give it one"),
    ],
)
def test_what_does_not_fit_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        softmax(x)


def test_the_interpreter_must_have_been_switched_on():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        softmax(torch.zeros(3), interpret=True)
