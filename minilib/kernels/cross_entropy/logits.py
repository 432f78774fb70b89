"""Cross-entropy of logits with the index of the right token: the logits are read once forward and once backward.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", which needs no second look at a row to
know its maximum; each lane of a program keeps a running maximum and sum of its own, and a row's lanes meet once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import DTYPES, as_rows, check_floats, jit, launch, runs_kernel, triton
from minilib.mechanisms.basics.arithmetic import next_power_of_two
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

REDUCTIONS = ("mean", "sum", "none")
LANES = 2048  # columns side by side: 256 threads, each with the 16 bytes that one load brings
DEPTH = 4  # such loads in flight a thread; each lane's sum is rescaled once for all of them


def reference(logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """`cross_entropy` in plain torch, in fp32 (fp64 stays fp64): the oracle, and what runs where there is no GPU."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # torch multiplies an ignored row's gradient by zero, and 0 · NaN is NaN: such a row is set aside here.
    rows = wide.masked_fill((targets == ignore_index).unsqueeze(-1), 0).reshape(targets.numel(), wide.shape[-1])
    loss = F.cross_entropy(rows, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean", interpret: bool = False
) -> Tensor:
    """log Σ exp(logits) − logits[target] over the last dimension, computed in fp32.

    A Triton kernel on a GPU, differentiable once; elsewhere `reference`. As in torch, "mean" of no counted target is
    NaN with a gradient of zero, a target whose logit is -inf costs infinity, and a row of nothing but -inf, or with
    +inf or NaN in it, costs NaN. Unlike torch, a row with an ignored target has a gradient of zero whatever it holds.

    Nothing here waits for the GPU, so a target out of range is not an error there: its loss and its row's gradient are
    NaN, and no logit outside the row is read.

    Args:
        logits: (..., vocab) fp32, fp16 or bf16, of any strides; rows that are not contiguous in themselves are copied.
        targets: (...) int64, each in [0, vocab) or `ignore_index`.
        ignore_index: the target that counts for nothing.
        reduction: "mean" over the targets that are not ignored, "sum", or "none".
        interpret: run the kernels in Triton's interpreter, on the CPU.

    Returns:
        fp32: a scalar, or for "none" the losses in the shape of `targets`, 0 where ignored.

    Raises:
        TypeError: for another dtype.
        ValueError: for shapes or devices that do not match, another reduction, a target out of range on the CPU, or if
            the interpreter is not on.
        RuntimeError: from a kernel's backward pass under create_graph=True.

    Cost: see `cost`. Source: see above.
    """
    check_floats("cross_entropy", logits=logits)
    if not logits.dim():
        raise ValueError("cross_entropy is taken over the last dimension, and logits has none")
    check_reduction("cross_entropy", reduction, REDUCTIONS)
    check_targets("cross_entropy", targets, logits.shape[:-1], logits.shape[-1], logits.device, ignore_index)
    if not runs_kernel(logits, interpret):
        return reference(logits, targets, ignore_index, reduction)
    losses = _CrossEntropy.apply(logits, targets, ignore_index)
    if reduction == "none":
        return losses
    return mean_of_counted(losses.sum(), targets, ignore_index) if reduction == "mean" else losses.sum()


def cost(rows: int, vocab: int, dtype: str = "bf16", backward: bool = False) -> Cost:
    """Forward 4 FLOPs a logit (max, −, exp, Σ) and one read; backward 5 (−, exp, ÷, −, ·), one read and one write."""
    size, values = BYTES[dtype], rows * vocab
    # A row's target is 8 bytes; its loss or the gradient thereof, its maximum and its sum are 4 each.
    return Cost((5 if backward else 4) * values, (2 if backward else 1) * size * values + 20 * rows, calls=1)


def mean_of_counted(total: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`total` over the number of targets that are not ignored; with none NaN, and a gradient of zero, as in torch."""
    count = (targets != ignore_index).sum()  # stays on the device: nothing waits for it
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


def losses_into_gradient(
    logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool = True, interpret: bool = False
) -> Tensor:
    """Losses of (rows, vocab) logits; with `gradient` the logits become the gradient of the losses' sum.

    A Triton kernel on a GPU, elsewhere plain torch, with one fp32 copy of 16-bit logits.

    Args:
        logits: (rows, vocab), contiguous. Without `gradient` what is left in them means nothing.
        targets: (rows,) int64, contiguous.
        ignore_index: the target whose loss and gradient are 0.
        gradient: whether it is wanted.
        interpret: as in `cross_entropy`.

    Returns:
        (rows,) fp32.
    """
    if runs_kernel(logits, interpret):
        losses, top, total = _forward(logits, targets, ignore_index)
        if gradient:
            one, vocab = torch.ones(1, dtype=torch.float32, device=logits.device), logits.shape[1]
            _launch(backward, logits, targets, one, top, total, logits, vocab, vocab, 0, ignore_index)
        return losses
    ignored = targets == ignore_index
    at = targets.masked_fill(ignored, 0).unsqueeze(1)
    wide = logits.float()  # fp32 logits themselves
    if not wide.numel():
        return wide.new_zeros(len(wide))
    wide -= wide.amax(1, keepdim=True)
    chosen = wide.gather(1, at).squeeze(1)
    total = wide.exp_().sum(1)
    if gradient:
        wide /= total.unsqueeze(1)
        wide.scatter_add_(1, at, wide.new_full((), -1.0).expand(at.shape))
        logits.copy_(wide.masked_fill_(ignored.unsqueeze(1), 0))
    return (total.log() - chosen).masked_fill(ignored, 0)


def check_reduction(op: str, reduction: str, allowed: tuple[str, ...]) -> None:
    """Refuse a reduction that the op does not have."""
    if reduction not in allowed:
        raise ValueError(f"{op} has the reductions {', '.join(map(repr, allowed))}, not {reduction!r}")


def check_targets(
    op: str, targets: Tensor, shape: torch.Size, vocab: int, device: torch.device, ignore_index: int
) -> None:
    """Refuse targets that are no int64 of this shape on this device or, on the CPU alone, lie outside [0, vocab).

    Raises:
        TypeError: for another dtype, or an `ignore_index` that is no integer.
        ValueError: for another shape or device, or a target out of range.
    """
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{op} wants targets in torch.int64; they are {got}: convert them with .long()")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{op} wants an integer as ignore_index, not {ignore_index!r}")
    if targets.shape != shape:
        raise ValueError(f"{op} wants one target a row, of shape {tuple(shape)}; targets are {tuple(targets.shape)}")
    if targets.device != device:
        raise ValueError(f"{op} wants one device; targets are on {targets.device}, the other tensors on {device}")
    if targets.device.type == "cpu":  # to look at the values on a GPU would be to wait for it
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab))]
        if len(wrong):
            raise ValueError(
                f"{op} wants targets in [0, {vocab}) or ignore_index {ignore_index}; one is {wrong[0].item()}"
            )


def check_first_derivative(op: str) -> None:
    """In a backward pass: refuse to be part of a graph of its own, where the gradient would pass for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} is differentiable once, and its kernels leave no graph: drop create_graph=True")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        rows, flat = as_rows(logits), targets.reshape(-1).contiguous()
        losses, top, total = _forward(rows, flat, ignore_index)
        ctx.save_for_backward(rows, flat, top, total)
        ctx.ignore_index, ctx.shape = ignore_index, logits.shape
        return losses.view(targets.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        check_first_derivative("cross_entropy")
        rows, flat, top, total = ctx.saved_tensors
        grad = grad.reshape(-1)  # of a sum it is one value with a stride of 0
        dx = torch.empty(ctx.shape, dtype=rows.dtype, device=rows.device)
        strides = (rows.stride(0), grad.stride(0))
        _launch(backward, rows, flat, grad, top, total, dx, rows.shape[1], *strides, ctx.ignore_index)
        return dx, None, None


def _forward(rows: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and, for rows that are not ignored, the two parts of the log-sum-exp, each (rows,) fp32."""
    losses, top, total = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(3))
    _launch(forward, rows, targets, losses, top, total, rows.shape[1], rows.stride(0), ignore_index)
    return losses, top, total


@jit
def forward(
    logits_ptr, targets_ptr, losses_ptr, top_ptr, total_ptr, vocab, stride_logits, ignore_index,
    LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Loss, maximum and Σ exp(logit − maximum) of one row, whose logits are read once.

    The log-sum-exp is kept in two parts: at logits of 10⁴ its last bit is 10⁻³, and exp(logit − it) off by as much.
    """
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
    else:
        logits_row = logits_ptr + row.to(tl.int64) * stride_logits  # there may be more than 2³¹ logits
        column = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        # A maximum that starts at the lowest finite value is never -inf, and -inf less it is -inf, never NaN.
        top, total = tl.full((LANES,), -3.4028234e38, tl.float32), tl.zeros((LANES,), tl.float32)
        for begin in range(0, vocab, DEPTH * LANES):
            there = begin + column < vocab
            logits = tl.load(logits_row + begin + column, mask=there, other=-float("inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(logits, 0))  # a thread holds whole lanes: nothing is exchanged
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[None, :]), 0)
            top = new_top
        row_top = tl.max(top, 0)
        row_total = tl.sum(total * tl.exp(top - row_top), 0)
        valid = (target >= 0) & (target < vocab)
        chosen = tl.load(logits_row + target, mask=valid, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + row, tl.log(row_total) + (row_top - chosen))
        tl.store(top_ptr + row, row_top)
        tl.store(total_ptr + row, tl.where(valid, row_total, float("nan")))  # carries NaN to the gradient


@jit
def backward(
    logits_ptr, targets_ptr, grad_ptr, top_ptr, total_ptr, dlogits_ptr, vocab, stride_logits, stride_grad, ignore_index,
    LANES: tl.constexpr,
):  # fmt: skip
    """d logits = d loss · (softmax − one-hot) of one row, written contiguously; it may overwrite the logits."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    dlogits_row = dlogits_ptr + row.to(tl.int64) * vocab
    column = tl.arange(0, LANES)
    if target == ignore_index:
        for begin in range(0, vocab, LANES):
            tl.store(dlogits_row + begin + column, tl.zeros((LANES,), tl.float32), mask=begin + column < vocab)
    else:
        logits_row = logits_ptr + row.to(tl.int64) * stride_logits
        grad = tl.load(grad_ptr + row.to(tl.int64) * stride_grad)
        top, scale = tl.load(top_ptr + row), 1 / tl.load(total_ptr + row)
        for begin in range(0, vocab, LANES):
            there = begin + column < vocab
            logits = tl.load(logits_row + begin + column, mask=there, other=-float("inf")).to(tl.float32)
            hit = tl.where(begin + column == target.to(tl.int32), 1.0, 0.0)
            tl.store(dlogits_row + begin + column, grad * (tl.exp(logits - top) * scale - hit), mask=there)


def choose_tile(vocab: int, backward: bool = False) -> dict[str, int]:
    """LANES and num_warps for rows of this width, and forward DEPTH.

    A thread brings 16 bytes (of 16-bit logits) a load. Backward it takes 32 registers and an SM is full of threads, so
    that one load in flight is enough; a second one costs occupancy where the vocabulary is odd and loads are narrow.
    """
    width = max(32, next_power_of_two(vocab))
    lanes = min(LANES, width)
    tile = {"LANES": lanes, "num_warps": max(1, lanes // 256)}
    return tile if backward else tile | {"DEPTH": min(DEPTH, width // lanes)}


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: both kernels, for a vocabulary of characters, a large one and an odd one."""
    chosen = (("bf16", 128), ("bf16", 128_256), ("fp32", 128_256), ("bf16", 50_257))
    if every:
        vocabularies = (32, 128, 256, 512, 1024, 2048, 4096, 8192, 32_000, 50_257, 128_256, 151_936)
        chosen = itertools.product(DTYPES.values(), vocabularies)
    found = []
    for dtype, vocab in chosen:
        types = dict.fromkeys(("logits_ptr", "dlogits_ptr"), f"*{dtype}") | {"targets_ptr": "*i64"}
        types |= dict.fromkeys(("losses_ptr", "grad_ptr", "top_ptr", "total_ptr"), "*fp32")
        types |= dict.fromkeys(("vocab", "stride_logits", "stride_grad", "ignore_index"), "i32")
        even = vocab % 16 == 0
        known = {
            "aligned": ("vocab",) if even else (),
            "unaligned": ("stride_grad", *(() if even else ("stride_logits",))),
        }
        for kernel, name in ((forward, "forward"), (backward, "backward")):
            tile = choose_tile(vocab, backward=kernel is backward)
            found.append(Build.of(kernel, f"{name}, {dtype}, vocabulary {vocab}", types, tile, **known))
    return found


def _launch(kernel, rows: Tensor, *arguments) -> None:
    if len(rows):
        launch(kernel, len(rows), rows, *arguments, **choose_tile(rows.shape[1], backward=kernel is backward))
