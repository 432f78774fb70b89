"""The norm over a whole mesh, where the mesh is one rank: what torch's own function does, NaN and infinity included."""

import math

import pytest
import torch

from minilib.parallel.global_norm import clip_global_norm


def parameters(value: float) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for parameter in found:
        parameter.grad = torch.tensor([3.0, 4.0, value])
    return found


@pytest.mark.parametrize("value", [0.0, 1e-9, -2.0, math.inf, math.nan])
@pytest.mark.parametrize("most", [0.5, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(value, most):
    ours, theirs = parameters(value), parameters(value)
    norm = clip_global_norm(most, [(ours, None)])
    expected = torch.nn.utils.clip_grad_norm_(theirs, most)
    assert norm == pytest.approx(expected.item(), nan_ok=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, equal_nan=True)
