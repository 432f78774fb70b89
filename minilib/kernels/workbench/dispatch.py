"""Where an op runs, and what it refuses: the few lines that every kernel of this package shares.

On a GPU an op launches its Triton kernel. On a CPU it computes the same in plain torch, unless the caller asks for
Triton's interpreter, which runs the kernel's own code, slowly, to show that it is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # Triton is for Linux; plain torch needs none of it
    triton = None
else:
    import triton.language as tl

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def jit(kernel):
    """`triton.jit` where there is Triton; elsewhere the function as it is, which nobody launches."""
    return triton.jit(kernel) if triton else kernel


def interpreted() -> bool:
    """True if Triton's interpreter is on, so that kernels of this process run on the CPU and cannot be compiled."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def upcasts(dtype: torch.dtype) -> bool:
    """True where `tl.dot` needs its operands in fp32: the interpreter multiplies bf16 as if it were integers."""
    return dtype == torch.bfloat16 and interpreted()


def runs_kernel(tensor: Tensor, interpret: bool) -> bool:
    """True if an op on this tensor launches its kernel, False if it computes in plain torch.

    Raises:
        ValueError: if the interpreter is asked for and was not switched on before Triton was imported.
    """
    if interpret and not interpreted():
        raise ValueError("interpret=True needs TRITON_INTERPRET=1 in the environment before Python starts (on Linux)")
    return triton is not None and (tensor.is_cuda or interpret)


def target_of(x: Tensor) -> str:
    """Whose tiles this tensor's GPU is given: one of `compiled.TARGETS`, or "sm_100"; "sm_80" on a CPU.

    "sm_90" is Hopper: 227 KiB of shared memory a program, a copy engine (TMA), and wgmma, which multiplies from shared
    memory into registers. "sm_100" is Blackwell for data centres. It has as much shared memory and the copy engine, but
    no wgmma: tcgen05 accumulates in a memory of its own. It is given Hopper's tiles, which nobody has measured there.
    """
    if torch.version.hip:
        return "gfx942"
    generation = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    return {9: "sm_90", 10: "sm_100"}.get(generation, "sm_80")


def check_floats(op: str, /, **tensors: Tensor) -> None:
    """Refuse what no kernel here computes: a dtype that is not fp32, fp16 or bf16, or tensors that do not match.

    All tensors must have the dtype and the device of the first.

    Raises:
        TypeError: for something that is no tensor of a supported dtype, or of another dtype than the first.
        ValueError: for a tensor on another device.
    """
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{op} computes in {', '.join(map(str, DTYPES))}; {name} is {got}: convert it with .to()")
        if x.dtype != first.dtype:
            raise TypeError(f"{op} wants one dtype; {first_name} is {first.dtype} and {name} is {x.dtype}: convert one")
        if x.device != first.device:
            raise ValueError(f"{op} wants one device; {first_name} is on {first.device} and {name} on {x.device}")


def as_rows(x: Tensor) -> Tensor:
    """View or copy of `x` as (rows, last dimension) whose rows are contiguous; the stride between rows is free."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def as_heads(x: Tensor) -> Tensor:
    """View or copy of `x` as (batch, tokens, heads, last dimension) with contiguous heads and all other strides free.

    Queries cut out of a fused projection, and gradients that attention hands back transposed, are views.
    """
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    heads = x.reshape(*(shape if x.dim() < 5 else (x.shape[:-3].numel(), *x.shape[-3:])))
    return heads if heads.stride(-1) == 1 or heads.shape[-1] <= 1 else heads.contiguous()


@jit
def head_offsets(row, tokens, heads, stride_batch, stride_token, stride_head):
    """Where each head of `as_heads` begins, `row` counting them all; in 64 bits, a tensor may hold more than 2³¹."""
    token, head = row // heads, row % heads
    batch, token = token // tokens, token % tokens
    return batch.to(tl.int64) * stride_batch + token.to(tl.int64) * stride_token + head.to(tl.int64) * stride_head


def launch(kernel, programs: int | tuple[int, ...], *arguments, **options) -> None:
    """Launch that many programs on the device of the first argument: Triton's own choice is the current device.

    `maxnreg` among the options is for NVIDIA's assembler, which without it aims at more programs on a multiprocessor
    than there are registers for, and spills a few. AMD's compiler has no such option.
    """
    if torch.version.hip:
        options.pop("maxnreg", None)
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,) if isinstance(programs, int) else programs](*arguments, **options)
