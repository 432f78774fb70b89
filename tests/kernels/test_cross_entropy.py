"""Cross-entropy without a GPU: what it costs, what it refuses, and plain torch where there is no kernel."""

import pytest
import torch
from torch.nn import functional as F

from minilib.kernels.cross_entropy.logits import (
    DEPTH,
    LANES,
    REDUCTIONS,
    choose_tile,
    cost,
    cross_entropy,
    losses_into_gradient,
    reference,
)

TARGETS = torch.tensor([0, -100, 4])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_a_cpu_it_is_the_reference_and_differentiable(reduction):
    x = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(x, TARGETS, reduction=reduction)
    assert torch.equal(loss, reference(x, TARGETS, reduction=reduction))
    loss.sum().backward()
    assert x.grad[0].any() and not x.grad[1].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reference_is_torchs_and_passes_gradcheck(reduction):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(reference(x, TARGETS, reduction=reduction), F.cross_entropy(x, TARGETS, reduction=reduction))
    assert torch.autograd.gradcheck(lambda x: reference(x, TARGETS, reduction=reduction), x)


def test_shapes_are_kept_and_no_target_costs_what_torch_says():
    x = torch.randn(2, 3, 5)
    assert cross_entropy(x, torch.zeros(2, 3, dtype=torch.int64), reduction="none").shape == (2, 3)
    assert cross_entropy(x[0, 0], torch.tensor(2), reduction="none").shape == ()
    for reduction in REDUCTIONS:
        ignored = torch.full((3,), -100)
        theirs = F.cross_entropy(x[0], ignored, reduction=reduction)
        assert torch.equal(cross_entropy(x[0], ignored, reduction=reduction).isnan(), theirs.isnan())


def test_an_ignored_row_has_no_gradient_whatever_it_holds():
    x = torch.full((3, 5), torch.nan)
    x[0] = x[2] = 1
    x.requires_grad_()
    cross_entropy(x, TARGETS).backward()
    assert x.grad.isfinite().all() and not x.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_takes_the_place_of_the_logits(dtype):
    x = torch.randn(3, 5).to(dtype).requires_grad_()
    expected = reference(x, TARGETS, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    dx = x.detach().clone()
    assert torch.allclose(losses_into_gradient(dx, TARGETS, -100), expected, atol=1e-6)
    assert torch.allclose(dx, wanted, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_its_cost_is_one_read_forward_and_a_read_and_a_write_backward():
    ends = 20 * 10  # a target and three fp32 values a row
    assert cost(10, 100, "bf16").bytes == 2 * 1000 + ends and cost(10, 100, "fp32").bytes == 4 * 1000 + ends
    assert cost(10, 100, "bf16", backward=True).bytes == 2 * 2 * 1000 + ends
    assert cost(10, 100).flops == 4000 and cost(10, 100, backward=True).flops == 5000


def test_tiles_are_powers_of_two_that_hold_narrow_rows_in_one_block():
    for vocab in (0, 1, 5, 32, 33, 1000, 2048, 2049, 4097, 128_256):
        tile = choose_tile(vocab)
        assert all(value.bit_count() == 1 for value in tile.values())
        assert tile["LANES"] * tile["DEPTH"] >= min(vocab, LANES * DEPTH)
        assert 1 <= tile["LANES"] // (32 * tile["num_warps"]) <= 8
        assert choose_tile(vocab, backward=True) == {key: tile[key] for key in ("LANES", "num_warps")}


LOGITS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS.double()}, TypeError, r"logits is torch.float64: convert it"),
        ({"logits": [1.0]}, TypeError, "logits is list"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits has none"),
        ({"targets": TARGETS.int()}, TypeError, r"they are torch.int32: convert them with .long\(\)"),
        ({"targets": [0, 1, 2]}, TypeError, "they are list"),
        ({"targets": TARGETS[:2]}, ValueError, r"one target a row, of shape \(3,\); targets are \(2,\)"),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets are on meta, the other tensors on cpu"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, r"targets in \[0, 5\) or ignore_index -100; one is 5"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "one is -1"),
        ({"ignore_index": 3}, ValueError, r"ignore_index 3; one is -100"),
        ({"ignore_index": -100.0}, TypeError, "an integer as ignore_index, not -100.0"),
        ({"reduction": "avg"}, ValueError, "has the reductions 'mean', 'sum', 'none', not 'avg'"),
        ({"interpret": True}, ValueError, "TRITON_INTERPRET=1"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(**({"logits": LOGITS, "targets": TARGETS} | change))
