"""RMSNorm without a GPU: what it costs, what it refuses, and plain torch where there is no kernel."""

import os
import platform
import re

import pytest
import torch
from torch.nn import functional as F

from minilib.kernels.rowwise import rms_norm as op
from minilib.kernels.rowwise.rms_norm import cost, reference, rms_norm
from minilib.kernels.workbench import compiled

X, WEIGHT = torch.ones(3, 5), torch.ones(5)


def test_on_a_cpu_it_is_the_reference_and_differentiable():
    x, weight, residual = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5), (5,), (3, 5)))
    assert torch.equal(rms_norm(x, weight), reference(x, weight))
    y, h = rms_norm(x, weight, residual, eps=0.1)
    assert torch.equal(h, x + residual) and torch.equal(y, reference(h, weight, eps=0.1))
    (y + h)[0, 0].backward()
    assert torch.equal(x.grad, residual.grad) and x.grad[0].abs().sum() > 0 and weight.grad[0] != 0


@pytest.mark.parametrize("residual", [False, True])
def test_the_reference_is_torchs_and_passes_gradcheck(residual):
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,), (3, 5))]
    x, weight, added = tensors
    h = x + added if residual else x
    y = reference(*tensors[: 2 + residual], eps=0.1)
    assert torch.allclose(y[0] if residual else y, F.rms_norm(h, (5,), weight, 0.1))
    assert torch.autograd.gradcheck(reference, tensors[: 2 + residual])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_keeps_the_dtype_and_rounds_once(dtype):
    x, weight = torch.randn(50, 40).to(dtype), torch.randn(40).to(dtype)
    y = reference(x, weight)
    assert y.dtype == dtype and torch.equal(y, F.rms_norm(x.float(), (40,), weight.float(), 1e-6).to(dtype))


@pytest.mark.skipif(
    platform.system() != "Linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles on Linux, uninterpreted"
)
@pytest.mark.parametrize("residual", [True, False])
def test_the_backward_pass_has_the_next_rows_on_their_way(residual):
    builds = {build.name: build for build in op.builds("sm_90", True)}
    for columns, prefetched in ((128, True), (8192, True), (16384, False)):  # the widest leave no room for it
        build = builds[f"backward, bf16, {columns} columns{', residual' * residual}"]
        ptx = compiled.compile_for("sm_90", build).asm["ptx"]
        left = [int(groups) for groups in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
        # Groups that the wait in the loop leaves: rstd, x and dy of a later block, and dh. None is left after the loop.
        assert left == ([3 + residual, 0] if prefetched else []), (columns, left)


def test_its_cost_is_each_tensor_once():
    assert cost(10, 100, "bf16").bytes == 2 * (2 * 1000 + 100) + 4 * 10
    assert cost(10, 100, "fp32", residual=True).bytes == 4 * (4 * 1000 + 100) + 4 * 10
    assert cost(10, 100).flops == 4000 and cost(10, 100, residual=True).flops == 5000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.double(), WEIGHT.double()), TypeError, r"x is torch.float64: convert it"),
        ((X, WEIGHT.half()), TypeError, r"x is torch.float32 and weight is torch.float16: convert one"),
        ((X, WEIGHT, X.bfloat16()), TypeError, r"residual is torch.bfloat16"),
        (([1.0], WEIGHT), TypeError, "x is list"),
        ((X, WEIGHT.to("meta")), ValueError, "weight on meta"),
        ((X, torch.ones(4)), ValueError, r"weight \(columns,\); got \(3, 5\) and \(4,\)"),
        ((X, torch.ones(1)), ValueError, r"weight \(columns,\); got \(3, 5\) and \(1,\)"),
        ((torch.tensor(1.0), WEIGHT), ValueError, r"got \(\) and \(5,\)"),
        ((X, WEIGHT, torch.ones(5)), ValueError, r"x's shape \(3, 5\), got \(5,\): expand it"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments)


def test_the_interpreter_must_have_been_switched_on():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        rms_norm(X, WEIGHT, interpret=True)
