"""Bytes that the backward pass of RMSNorm reads, counted in the interpreter."""

import pytest
import torch

from minilib.kernels.rowwise import rms_norm as op
from minilib.kernels.workbench.dispatch import interpreted
from minilib.kernels.workbench.traffic import count_traffic

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it")


@pytest.mark.parametrize("residual", [False, True])
def test_a_program_reads_the_weight_once_and_each_row_once(residual):
    x, weight, added, dy = (torch.randn(*shape) for shape in ((300, 64), (64,), (300, 64), (300, 64)))
    leaves = [x.requires_grad_(), weight.requires_grad_(), added.requires_grad_()][: 2 + residual]
    out = op.rms_norm(*leaves, interpret=True)
    y, grads = (out[0], [dy, dy]) if residual else (out, [dy])
    outputs = list(out) if residual else [y]
    programs = op._programs(x, op.choose_tile(64, 4, backward=True))
    with count_traffic(weight=weight.detach(), dy=dy) as traffic:
        torch.autograd.grad(outputs, leaves, grads)
    rows = 2 if residual else 1  # dy is also the gradient of the sum
    assert programs > 1 and traffic.programs == programs
    assert traffic.loaded == 4 * (programs * 64 + rows * 300 * 64)
