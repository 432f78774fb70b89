"""SwiGLU without a GPU: what it costs, what it refuses, and plain torch where there is no kernel."""

import pytest
import torch
from torch.nn import functional as F

from minilib.kernels.rowwise.swiglu import cost, reference, swiglu


def test_on_a_cpu_it_is_the_reference_and_differentiable():
    gate_up = torch.randn(3, 10, requires_grad=True)
    assert torch.equal(swiglu(gate_up), reference(gate_up)) and swiglu(gate_up).shape == (3, 5)
    swiglu(gate_up)[0, 0].backward()
    assert gate_up.grad.nonzero().tolist() == [[0, 0], [0, 5]]


def test_the_reference_is_torchs_and_passes_gradcheck():
    gate_up = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(reference(gate_up), F.silu(gate_up[:, :5]) * gate_up[:, 5:])
    assert torch.autograd.gradcheck(reference, gate_up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_keeps_the_dtype_and_rounds_once(dtype):
    gate_up = torch.randn(50, 80).to(dtype)
    gate, up = gate_up.float().chunk(2, -1)
    assert reference(gate_up).dtype == dtype and torch.equal(reference(gate_up), (F.silu(gate) * up).to(dtype))


def test_its_cost_is_two_reads_and_one_write_an_output():
    assert cost(10, 100, "bf16").bytes == 3 * 2 * 1000 and cost(10, 100, "fp32").bytes == 3 * 4 * 1000
    assert cost(10, 100).flops == 5000


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), TypeError, r"gate_up is torch.float64: convert it"),
        (torch.zeros(4, dtype=torch.int32), TypeError, r"gate_up is torch.int32"),
        ([1.0, 2.0], TypeError, "gate_up is list"),
        (torch.tensor(1.0), ValueError, r"gate and up side by side; got \(\)"),
        (torch.zeros(2, 5), ValueError, r"gate and up side by side; got \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(gate_up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate_up)


def test_the_interpreter_must_have_been_switched_on():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        swiglu(torch.zeros(4), interpret=True)
