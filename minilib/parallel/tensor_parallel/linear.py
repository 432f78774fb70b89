"""Linear layers of which each rank has some columns, or some rows, of the weight.

    ColumnParallelLinear    every rank computes some of the features of all tokens; nothing is exchanged after
    RowParallelLinear       every rank has some of the features of all tokens, and computes a part of every sum

The first feeds the second without an exchange, through anything that looks at one feature, or one head, at a time.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilib.parallel.tensor_parallel.stream import Stream


class ColumnParallelLinear(nn.Module):
    """(…, in_features) of the stream → (…, this rank's out_features) of all tokens.

    Args:
        weight: (this rank's out_features, in_features).
        bias: (this rank's out_features,), or None.
        stream: where the input comes from.

    Cost: 1/n of the product, in forward and twice in backward; on the wire what the stream's `enter` takes.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, stream: Stream) -> None:
        super().__init__()
        self.weight, self.bias, self.stream = weight, bias, stream

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(x, self.weight, self.bias, self.stream)


class RowParallelLinear(nn.Module):
    """(…, this rank's in_features) of all tokens → (…, out_features) of the stream.

    Args:
        weight: (out_features, this rank's in_features).
        stream: where the output goes.

    Cost: 1/n of the product, in forward and twice in backward; on the wire what the stream's `leave` takes.
    """

    def __init__(self, weight: nn.Parameter, stream: Stream) -> None:
        super().__init__()
        self.weight, self.stream = weight, stream

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        return _Row.apply(x.to(dtype), self.weight.to(dtype), self.stream)


def column_parallel(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream) -> Tensor:
    """See `ColumnParallelLinear`."""
    dtype = product_dtype(x)
    y = _Column.apply(x.to(dtype), weight.to(dtype), stream)
    return y if bias is None else y + bias.to(dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which x is multiplied: autocast does not reach into the functions below."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stream: Stream) -> Tensor:
        ctx.stream, ctx.shape, rows = stream, x.shape, x.reshape(-1, x.shape[-1])
        ctx.tokens = stream.num_tokens(rows)
        full, y = stream.gather_and_multiply(rows, weight.t(), ctx.tokens)
        ctx.save_for_backward(rows if stream.regather else full, weight)
        return stream.all_tokens(y, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        for_input, for_weight = ctx.needs_input_grad[:2]
        full = ctx.stream.begin_gather(rows, ctx.tokens) if ctx.stream.regather and for_weight else lambda: rows
        grad_input = ctx.stream.begin_reduce(grad @ weight) if for_input else None
        grad_weight = grad.t() @ full() if for_weight else None  # while gradients of the input are summed
        return grad_input().view(ctx.shape) if grad_input else None, grad_weight, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stream: Stream) -> Tensor:
        ctx.stream, ctx.shape, rows = stream, x.shape, x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        return stream.of_stream(stream.multiply_and_reduce(rows, weight.t()), x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        full, grad_rows = ctx.stream.gather_and_multiply(grad, weight, len(rows))
        grad_weight = full.t() @ rows if ctx.needs_input_grad[1] else None
        return grad_rows.view(ctx.shape), grad_weight, None


class Leave(torch.autograd.Function):
    """What ranks have for all tokens, (…, features), summed into the stream; backward brings gradients to all of it."""

    @staticmethod
    def forward(ctx, x: Tensor, stream: Stream) -> Tensor:
        ctx.stream, ctx.shape, rows = stream, x.shape, x.reshape(-1, x.shape[-1])
        return stream.of_stream(stream.reduce(rows.clone()), x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        tokens = ctx.shape[:-1].numel()
        return ctx.stream.begin_gather(grad.reshape(-1, grad.shape[-1]), tokens)().view(ctx.shape), None


class Enter(torch.autograd.Function):
    """All tokens of the stream on every rank, (…, features); backward sums gradients into the stream."""

    @staticmethod
    def forward(ctx, x: Tensor, stream: Stream) -> Tensor:
        ctx.stream, ctx.shape, rows = stream, x.shape, x.reshape(-1, x.shape[-1])
        return stream.all_tokens(stream.begin_gather(rows, stream.num_tokens(rows))().clone(), x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.stream.reduce(grad.reshape(-1, grad.shape[-1]).clone()).view(ctx.shape), None
