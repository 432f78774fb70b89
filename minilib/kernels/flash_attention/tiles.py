"""What the kernels of FlashAttention, forward and backward, share: which tile a program takes, and how it reads rows.

A tensor is (batch, tokens, heads, head_dim) with any strides but 1 in the last dimension, or, of variable length,
(total tokens, heads, head_dim) with the sequences one after another. The logarithms of the softmax's sums are
(batch, heads, tokens) or (heads, total tokens), contiguous.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minilib.kernels.workbench.compiled import COMPILER_OPTIONS, Build
from minilib.kernels.workbench.dispatch import DTYPES, interpreted, target_of, triton, upcasts

if triton:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

HEAD_DIMS = (16, 32, 64, 128)
L2_SHARE = 24 * 2**20  # bytes that the heads at work together may read again and again: half the L2 cache of an H200

# Lengths differ from call to call: specialised for 1 and for multiples of 16, a kernel is compiled again and again.
_LENGTHS = ["q_len", "k_len", "num_heads", "num_blocks", "section"]
jit = triton.jit(do_not_specialize=_LENGTHS) if triton else lambda kernel: kernel


class Case(NamedTuple):
    """What one compiled kernel is for; `group` is query heads to a kv head."""

    dtype: torch.dtype
    head_dim: int
    causal: bool
    varlen: bool
    group: int = 4


# All that is compiled ahead of time. A group of 4 stands for all larger ones; a group of 1 has nothing to divide by.
EVERY_CASE = tuple(Case(*of) for of in itertools.product(DTYPES, HEAD_DIMS, (True, False), (False, True), (4, 1)))
# What every test run compiles of it.
CASES = (
    Case(torch.bfloat16, 128, True, False),
    Case(torch.bfloat16, 64, True, True),
    Case(torch.float16, 128, False, False),
    Case(torch.float32, 128, True, True),
    # with other tiles these spilled
    Case(torch.bfloat16, 128, True, True),
    Case(torch.float16, 128, True, True),
    Case(torch.float32, 16, True, True),
    Case(torch.float32, 32, True, True),
    Case(torch.float32, 32, False, False),
    Case(torch.float32, 16, False, False),
)


@dataclass(frozen=True)
class Problem:
    """Sizes of one call.

    Args:
        batch: sequences.
        num_heads, num_kv_heads, head_dim: of q, of k and v, of all.
        q_len, k_len: tokens of each sequence or, of variable length, of all sequences.
        max_q, max_k: tokens of the longest sequence.
        causal: query t sees keys 0 … its k_len - its q_len + t.
        scale: factor on the scores.
        varlen: whether there are cu_seqlens.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_len: int
    k_len: int
    max_q: int
    max_k: int
    causal: bool
    scale: float
    varlen: bool

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    def constants(self, dtype: torch.dtype) -> dict:
        """What the kernels are compiled for, but for the tile."""
        names = {"GROUP": self.group, "HEAD_DIM": self.head_dim, "CAUSAL": self.causal, "VARLEN": self.varlen}
        return names | {"UPCAST": upcasts(dtype)}

    def strides(self, *tensors: Tensor) -> list[int]:
        """Batch, token and head stride of each; sequences of variable length have no batch stride."""
        return [stride for x in tensors for stride in ([0] if self.varlen else []) + list(x.stride()[:-1])]

    def section(self, rows: int, itemsize: int, of: int) -> int:
        """Heads whose programs run side by side, so that the rows which all of them read stay in the L2 cache.

        Args:
            rows: rows of a kv head that its programs read again and again, of two tensors each: K and V, or Q and dO.
            itemsize: bytes of a value.
            of: heads of a sequence that have programs: num_heads, or num_kv_heads.

        Returns:
            A number of heads, from 1 to batch · of.
        """
        fit = max(1, L2_SHARE // max(1, 2 * rows * self.head_dim * itemsize))
        return min(fit * of // self.num_kv_heads, self.batch * of)  # more would not fit 32 bits times num_blocks


@jit
def schedule(num_blocks, section, LAST_FIRST: tl.constexpr):
    """Tile and head of this program. Grid: (num_blocks · heads of all sequences,).

    All tiles of `section` neighbouring heads come before the next section, so that what these read of K and V stays
    in the L2 cache. Within a section the longest tiles come first, so that no long one is left for the end.
    """
    program, heads = tl.program_id(0), tl.num_programs(0) // num_blocks
    first = program // (num_blocks * section) * section
    size = tl.minimum(section, heads - first)
    inside = program - first * num_blocks
    block = inside // size
    if LAST_FIRST:
        block = num_blocks - 1 - block
    return block, first + inside % size


@jit
def span(cu_ptr, sequence, length, VARLEN: tl.constexpr):
    """Where a sequence's tokens begin, and how many they are."""
    start = sequence * 0
    if VARLEN:
        start = tl.load(cu_ptr + sequence)
        length = tl.load(cu_ptr + sequence + 1) - start
    return start, length + sequence * 0  # a tensor under the interpreter too, where a scalar argument is none


@jit
def task(
    cu_q_ptr, cu_k_ptr, q_len, k_len, num_heads, num_blocks, section, LAST_FIRST: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Tile, sequence and head of this program; where the sequence's queries and keys begin, and how many they are."""
    block, pair = schedule(num_blocks, section, LAST_FIRST)
    sequence, head = pair // num_heads, pair % num_heads
    q_start, queries = span(cu_q_ptr, sequence, q_len, VARLEN)
    k_start, keys = span(cu_k_ptr, sequence, k_len, VARLEN)
    return block, sequence, head, q_start, queries, k_start, keys


@jit
def head_at(ptr, sequence, start, head, stride_b, stride_t, stride_h):
    """Address of a sequence's first row of one head; a tensor may hold more than 2³¹ values."""
    return ptr + sequence.to(tl.int64) * stride_b + start.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h


@jit
def packed_at(sequence, start, head, length, num_heads, VARLEN: tl.constexpr):
    """Index of a sequence's first row of one head in contiguous (…, tokens, heads) and (…, heads, tokens)."""
    before = sequence.to(tl.int64)
    if VARLEN:
        before = before * 0
    return (before * length + start) * num_heads + head, (before * num_heads + head) * length + start


@jit
def read_rows(
    source, sequence, head, first, end, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """Rows first … first + BLOCK - 1 of one head, as (BLOCK, HEAD_DIM); those from `end` on are 0, if MASKED.

    `source` is what `head_at` gives or, with TMA, the whole tensor's descriptor, through which the copy engine reads.
    """
    if TMA:
        rows = tl.reshape(source.load([sequence, first, head, 0]), (BLOCK, HEAD_DIM))
    else:
        row = first + tl.arange(0, BLOCK)
        at = source + row.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
        if MASKED:
            rows = tl.load(at, mask=(row < end)[:, None], other=0.0)
        else:
            rows = tl.load(at)
    if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
        rows = rows.to(tl.float32)
    return rows


@jit
def write_rows(ptr, before, num_heads, first, end, rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows first … end - 1 of one head into a contiguous (…, tokens, heads, HEAD_DIM); `before` is of `packed_at`."""
    row = first + tl.arange(0, BLOCK)
    at = (before + row.to(tl.int64) * num_heads)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + at, rows, mask=(row < end)[:, None])


@jit
def keys_seen(first, queries, keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of BLOCK_M queries from `first` on: keys that all see in whole blocks, keys that one sees, each query's last."""
    row, full, end = first + tl.arange(0, BLOCK_M), keys, keys
    last = row * 0 + (keys - 1)
    if CAUSAL:
        last = row + (keys - queries)
        full = tl.maximum(tl.minimum(keys, keys - queries + first + 1), 0)
        end = tl.maximum(tl.minimum(keys, keys - queries + first + BLOCK_M), 0)
    return full // BLOCK_N * BLOCK_N, end, last


def suits_copy_engine(*tensors: Tensor) -> bool:
    """True if TMA can read these tensors: 16-bit, dense, and aligned to 16 bytes; the interpreter imitates it."""
    there = target_of(tensors[0]) in ("sm_90", "sm_100") or (interpreted() and not tensors[0].is_cuda)
    wanted = all(x.itemsize == 2 and x.dim() == 4 and x.data_ptr() % 16 == 0 for x in tensors)
    return there and wanted and all(s > 0 and s % 8 == 0 for x in tensors for s in x.stride()[:-1])


def describe(x: Tensor, block: int) -> TensorDescriptor:
    """The copy engine's view of a dense tensor: it reads `block` tokens of one head, and 0 past the last token."""
    return TensorDescriptor.from_tensor(x, [1, block, 1, x.shape[-1]])


def build_of(kernel, name: str, case: Case, tile: dict[str, int], dots: int = 0, copied: tuple[str, ...] = ()) -> Build:
    """A kernel at one case, compiled ahead of time; `copied`: arguments that are descriptors of BLOCK_N rows."""
    dtype = DTYPES[case.dtype]
    types = dict.fromkeys(("out_ptr", "q", "k", "v", "grad", "dq_ptr", "dk_ptr", "dv_ptr"), f"*{dtype}")
    types |= {name: f"tensordesc<{dtype}[1, {tile['BLOCK_N']}, 1, {case.head_dim}]>" for name in copied}
    types |= dict.fromkeys(("lse_ptr", "delta_ptr", "grad_lse_ptr"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32")
    types |= dict.fromkeys([*_LENGTHS, *[f"stride_{x}{of}" for x in "qkvg" for of in "bth"]], "i32")
    constants = {"GROUP": case.group, "HEAD_DIM": case.head_dim, "CAUSAL": case.causal, "VARLEN": case.varlen}
    constants |= {"UPCAST": False, "TMA": bool(copied)} | tile
    constants |= {} if case.varlen else {"cu_q_ptr": None, "cu_k_ptr": None}
    taken = {*kernel.arg_names, *COMPILER_OPTIONS}
    options = {key: value for key, value in constants.items() if key in taken}
    words = [name, dtype, f"head_dim {case.head_dim}", *["causal"] * options.get("CAUSAL", False)]
    words += ["varlen"] * case.varlen + [f"group {case.group}"] * ("GROUP" in options) + ["TMA"] * bool(copied)
    return Build.of(kernel, ", ".join(words), types, options, dots=0 if dtype == "fp32" else dots)
