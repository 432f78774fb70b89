"""Does an optimizer treat every element alike? ZeRO hands it flat slices, so it must: tried on a few values.

    a tensor of 2 × 3      │ 1 2 3 │         the same values and gradients as two flat slices    │ 1 2 3 4 │ 5 6 │
                           │ 4 5 6 │

SGD and Adam take both to the same values. Adafactor and LAMB, which take norms of tensors, and Muon and Shampoo, which
use their shapes, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

NUM_STEPS = 3  # moments and bias corrections count from the second step on
RATE = 0.1  # in place of the caller's, which may be 0 while it warms up
CUT = (4, 2)  # elements of the slices


class NotElementwise(ValueError):
    """An optimizer that updates an element by what else is in its tensor; the message says which and how that shows."""


def check_elementwise(
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    groups: Sequence[Mapping],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let an optimizer take a few steps on a small tensor, and on the same tensor in two flat slices.

    Args:
        optimizer: makes one from groups of parameters; called twice, with small parameters.
        groups: of the caller, whose options it gets.
        dtype, device: of the parameters that it will update.

    Raises:
        NotElementwise: if the two end at other values, or the optimizer takes no slices, no dense gradients, or no
            steps without a closure.
    """
    # The second slice is far larger than the first, so that a norm of both is far from a norm of either.
    value = torch.tensor([[0.01, -0.02, 0.03], [0.02, 5.0, -7.0]], dtype=dtype, device=device)
    gradients = [value.cos() * value * scale for scale in (1.0, -3.0, 2.0)]
    whole = [[nn.Parameter(value.clone())] for _ in groups]
    cut = [[nn.Parameter(part.clone()) for part in value.flatten().split(CUT)] for _ in groups]
    one = optimizer(_regrouped(groups, whole))  # what it raises here is about its options
    name = type(one).__name__
    try:
        _take_steps(one, whole, [[gradient] for gradient in gradients])
        other = optimizer(_regrouped(groups, cut))
        _take_steps(other, cut, [gradient.flatten().split(CUT) for gradient in gradients])
    except (RuntimeError, TypeError, ValueError) as error:
        raise NotElementwise(f"{name} cannot update slices of parameters ({error}): {_MEND}") from error
    for [expected], slices in zip(whole, cut, strict=True):
        found = torch.cat([part.detach() for part in slices]).view_as(expected)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-6, equal_nan=True):
            difference = (found - expected).abs().max().item()
            raise NotElementwise(
                f"{name} takes {NUM_STEPS} steps to other values when a tensor is cut into slices "
                f"(by up to {difference:.2g}): {_MEND}"
            )


_MEND = (
    "ZeRO cuts parameters into flat slices; pass an optimizer that treats every element alike, such as AdamW or SGD, "
    "or train with DataParallel"
)


def _regrouped(groups: Sequence[Mapping], parameters: Sequence[Collection[nn.Parameter]]) -> list[dict]:
    return [{**group, "params": list(mine)} for group, mine in zip(groups, parameters, strict=True)]


def _take_steps(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[nn.Parameter]], steps: Iterable[Sequence[Tensor]]
) -> None:
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.full_like(group["lr"], RATE) if isinstance(group["lr"], Tensor) else RATE
    for gradients in steps:
        for mine in parameters:
            for parameter, gradient in zip(mine, gradients, strict=True):
                parameter.grad = gradient.clone()
        optimizer.step()
