"""Cross-entropy of hidden @ weight.T, a chunk of tokens at a time: the logits of all tokens never exist together.

What a chunk's logits are for, its losses and the gradients of hidden and weight, is computed while they are there, in
the forward pass; their gradient overwrites them. The backward pass only scales. No matrix product is done twice.

Sources: Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", section 3.2 (chunks, gradients in
the forward pass). Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", is the alternative: fused
into the matrix product not even a chunk's logits reach memory, and backward computes them once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.kernels.cross_entropy import logits as rowwise
from minilib.kernels.workbench.dispatch import check_floats
from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.numbers.price import BYTES, Cost

SHARE = 8  # all logits over those that exist at a time
REDUCTIONS = ("mean", "sum")


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """`linear_cross_entropy` in plain torch with all logits in memory: the oracle, and nothing else."""
    return rowwise.reference(hidden @ weight.T, targets, ignore_index, reduction)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean",
    max_logits: int | None = None, interpret: bool = False,
) -> Tensor:  # fmt: skip
    """Cross-entropy of hidden @ weight.T with `targets`, holding an eighth of the logits at a time.

    Chunks of tokens on every device; the cross-entropy of a chunk is a Triton kernel on a GPU, plain torch elsewhere.
    Differentiable once. Only gradients that are wanted are computed, none under `torch.no_grad()`. Logits and their
    gradient are rounded to hidden's dtype, as those of a linear layer are; losses are computed in fp32. Autocast does
    not reach inside. Ignored, masked and wrong targets are what they are in `cross_entropy`, and as there nothing
    waits for the GPU. Beside a chunk's logits, memory holds the gradients of hidden, in its dtype, and of weight, in
    fp32, from the forward pass to the backward pass.

    Args:
        hidden: (..., hidden_size) fp32, fp16 or bf16.
        weight: (vocab, hidden_size), hidden's dtype.
        targets: (...) int64, each in [0, vocab) or `ignore_index`.
        ignore_index: the target that counts for nothing.
        reduction: "mean" over the targets that are not ignored, or "sum". There is no "none": what comes back with each
            loss must be known before its chunk's logits are gone.
        max_logits: the most logits to hold at a time; see `chunk_tokens` for the default.
        interpret: run the kernels in Triton's interpreter, on the CPU.

    Returns:
        fp32 scalar.

    Raises:
        TypeError: for another dtype, or dtypes that differ.
        ValueError: for shapes or devices that do not match, another reduction, a target out of range on the CPU, a
            `max_logits` that holds no token, or if the interpreter is not on.
        RuntimeError: from the backward pass under create_graph=True.

    Cost: see `cost`. Source: see above.
    """
    op = "linear_cross_entropy"
    check_floats(op, hidden=hidden, weight=weight)
    if not hidden.dim() or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{op} wants hidden (..., hidden_size) and weight (vocab, hidden_size); {shapes}")
    rowwise.check_reduction(op, reduction, REDUCTIONS)
    rowwise.check_targets(op, targets, hidden.shape[:-1], len(weight), hidden.device, ignore_index)
    chunk = chunk_tokens(targets.numel(), len(weight), max_logits)
    tokens = hidden.reshape(targets.numel(), hidden.shape[-1])
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    flat = targets.reshape(-1).contiguous()
    total = _LinearCrossEntropy.apply(tokens, weight, flat, ignore_index, chunk, wanted, interpret)
    return rowwise.mean_of_counted(total, targets, ignore_index) if reduction == "mean" else total


def chunk_tokens(tokens: int, vocab: int, max_logits: int | None = None) -> int:
    """Tokens in a chunk: ⌈tokens / n⌉ for the fewest chunks n of at most max_logits // vocab tokens each.

    By default max_logits is an eighth of all, tokens · vocab / 8, and a chunk at least one token: 8 chunks if 8 divides
    tokens, else mostly 9. Chunks are as large as that allows, because each reads weight anew and reads and writes its
    gradient, and even, so that none is too small for the tensor cores. With 1024 tokens a chunk (8192 in all) each fp32
    value of weight's gradient gets 2 · 1024 FLOPs for 8 bytes, 256 a byte: what an H200 needs to be bound by compute is
    about 200. With far fewer tokens logits are small, and a larger max_logits buys speed.

    Raises:
        ValueError: if max_logits has no room for the logits of one token.
    """
    if max_logits is not None and max_logits < max(1, vocab):
        raise ValueError(f"max_logits={max_logits} has no room for the {vocab} logits of one token")
    most = max(1, tokens // SHARE if max_logits is None else max_logits // max(1, vocab))
    return ceil_div(tokens, max(1, ceil_div(tokens, most)))


def cost(
    tokens: int, hidden_size: int, vocab: int, dtype: str = "bf16", hidden_grad: bool = True, weight_grad: bool = True,
    max_logits: int | None = None,
) -> Cost:  # fmt: skip
    """What the forward pass does, gradients included: 2 · tokens · hidden_size · vocab FLOPs for each matrix product.

    Bytes: logits are written, read by the losses, read and written by their gradient, and read by each product with it;
    every chunk reads weight in one product or two, and writes its fp32 gradient, which all but the first read before.
    FLOPs are those of the matrix products alone. Without a gradient there is one product and one read of the logits.
    """
    size, gradients = BYTES[dtype], hidden_grad + weight_grad
    passes = 2 + gradients if gradients else 0  # over the logits, for what the losses alone do not need
    chunks = ceil_div(tokens, max(1, chunk_tokens(tokens, vocab, max_logits)))
    weights = size * chunks * (1 + hidden_grad) + 4 * max(0, 2 * chunks - 1) * weight_grad  # bytes for each weight
    moved = size * tokens * vocab * (2 + passes) + weights * hidden_size * vocab
    moved += size * tokens * hidden_size * (1 + gradients)
    flops = 2 * tokens * hidden_size * vocab * (1 + gradients)
    return Cost(flops, moved, calls=chunks * (2 + (1 + gradients if gradients else 0)), dtype=dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses. It is computed together with its gradients, which wait for what comes back."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int,
        wanted: tuple[bool, bool], interpret: bool,
    ) -> Tensor:  # fmt: skip
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        # One chunk after another is added to weight's gradient: in 16 bits each addition would round the sum so far
        # anew, and what a late chunk adds to a large sum would be lost. It stays fp32 until backward has scaled it.
        new = torch.empty if len(hidden) else torch.zeros  # the first chunk writes, the others add
        dweight = new(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None
        room = torch.empty((chunk, len(weight)), dtype=hidden.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), max(1, chunk)):
                part = slice(begin, begin + chunk)
                logits = torch.mm(hidden[part], weight.T, out=room[: len(losses[part])])
                losses[part] = rowwise.losses_into_gradient(logits, targets[part], ignore_index, any(wanted), interpret)
                if dhidden is not None:
                    torch.mm(logits, weight, out=dhidden[part])
                if dweight is not None:
                    _add_product(dweight, logits.T, hidden[part], beta=min(begin, 1))
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = hidden.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rowwise.check_first_derivative("linear_cross_entropy")
        dhidden, dweight = (_scaled(sums, grad, ctx.dtype) for sums in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None, None


def _add_product(sums: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """sums = beta · sums + left @ right in fp32; cuBLAS takes 16-bit factors as they are, others want them wide."""
    if left.dtype != sums.dtype and sums.is_cuda and not torch.version.hip:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, beta=beta, out=sums)
    else:
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype), beta=beta)


def _scaled(sums: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """sums · scale, rounded once to dtype. The sums stay as they are: backward may come twice, with retain_graph."""
    if sums is None:
        return None
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    # As a scalar the scale would be rounded to the sums' dtype first, where a loss scale of 2¹⁶ is infinite in fp16.
    return torch.mul(sums, scale.reshape(1, 1), out=out)
