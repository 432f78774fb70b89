"""What Numba's Python cannot say: a block of products held in registers, and an array at an address.

A product of few rows reads its whole matrix once, so it should take no longer than the memory needs for that. It does
if every vector of the matrix that arrives is multiplied with all rows while it is in a register:

                       panel: K × WIDTH, in the order in which it is read
    x  r0 │ k0 k1 …    k0  [ LANES ][ LANES ]     one vector of the panel, times one number of each row, is added to
       r1 │ k0 k1 …    k1  [ LANES ][ LANES ]     one accumulator a row: 2 · rows accumulators stay in registers for
       …               …                          the whole of K

A compiler vectorises the innermost loop, here over K, and would keep the sums of one number at a time; so this loop is
written for LLVM by hand. Each number of the result is summed over K in the same order however many rows there are:
what a row gets does not depend on the rows beside it, to the last bit.

Each k has 32 bits in the figure: a number in fp32, or two neighbouring ones in bf16, which a CPU with AVX512-BF16
multiplies and adds to the accumulator in one instruction. Nothing else changes: half the k, half the bytes.

Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 2008.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from llvmlite import binding, ir
from numba import config, njit, set_num_threads, types
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f"))
LANES = 16 if _WIDE else 8  # fp32 numbers in a vector
VECTORS = 2
WIDTH = VECTORS * LANES  # columns of a panel
ROWS = 12 if _WIDE else 4  # most rows of a block: VECTORS · (ROWS + 1) + 1 vectors fit into 32 or 16 registers

FP32, BF16_PAIRS = 0, 1  # what 32 bits of rows and panels hold
MULTIPLIES_PAIRS = bool(_FEATURES.get("avx512bf16"))
HAS_AMX = bool(_FEATURES.get("amx-bf16"))

# Sums may be taken in another order and products be fused with sums; NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}

FLOAT, LONG = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)


def _folder_of_cache() -> str:
    """Where compiled code is kept: a folder of this version of all files here, for Numba looks at single ones alone."""
    here = Path(__file__).parent
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:12]
    own = here / "__pycache__"
    writable = os.access(own if own.exists() else here, os.W_OK)
    return str((own if writable else Path(tempfile.gettempdir())) / f"kernels-{version}-{getpass.getuser()}")


def kernel(signature: types.Type, parallel: bool = True) -> Callable[[Callable], Callable]:
    """Compile a function for this signature now, or load it if that was done before."""

    def decorate(function: Callable) -> Callable:
        binding.initialize_native_asmparser()  # Numba does not; a kernel that is called may be kept, with its assembly
        before, config.CACHE_DIR = config.CACHE_DIR, _FOLDER
        try:
            return njit(signature, parallel=parallel, cache=True, fastmath=FAST, error_model="numpy")(function)
        finally:
            config.CACHE_DIR = before

    return decorate


_FOLDER = _folder_of_cache()


def follow_threads_of_torch() -> None:
    """Let kernels of this thread run on as many cores as torch's operations do."""
    set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))


@intrinsic(prefer_literal=True)
def block_of_rows(typing, held, rows, first, x, x_stride, panel, y, y_stride, depth):
    """y[r, :WIDTH] = Σₖ x[r, k] · panel[k, :WIDTH] for first ≤ r < first + rows, y in fp32.

    Args:
        held: what x[r, k] and the numbers of panel[k] are, a constant: FP32, or BF16_PAIRS, whose dot product is taken.
        rows: number of rows, a constant, 1 … ROWS.
        first: number of the first row.
        x, panel, y: addresses.
        x_stride, y_stride: from one row to the next, in units of 32 bits.
        depth: K, at least 1.
    """
    signature = types.void(held, rows, *[types.int64] * 7)

    def generate(context, builder, signature, arguments):
        count, add_product = rows.literal_value, _ADD_PRODUCT[held.literal_value]
        _, _, first, x, x_stride, panel, y, y_stride, depth = arguments
        x, panel, y = (builder.inttoptr(address, FLOAT.as_pointer()) for address in (x, panel, y))
        numbers = [builder.add(first, LONG(r)) for r in range(count)]
        x_rows = [builder.gep(x, [builder.mul(x_stride, r)]) for r in numbers]
        y_rows = [builder.gep(y, [builder.mul(y_stride, r)]) for r in numbers]

        before, loop, after = builder.block, builder.append_basic_block("over_k"), builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(LONG)
        k.add_incoming(LONG(0), before)
        sums = [[builder.phi(VECTOR) for _ in range(VECTORS)] for _ in range(count)]
        line = builder.gep(panel, [builder.mul(k, LONG(WIDTH))])
        weights = [builder.load(_vector_at(builder, line, v), align=4) for v in range(VECTORS)]
        for x_row, row in zip(x_rows, sums, strict=True):
            number = _in_every_lane(builder, builder.load(builder.gep(x_row, [k])))
            for weight, total in zip(weights, row, strict=True):
                total.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), before)
                total.add_incoming(add_product(builder, number, weight, total), loop)
        following = builder.add(k, LONG(1))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)

        builder.position_at_end(after)
        for y_row, row in zip(y_rows, sums, strict=True):
            for v, total in enumerate(row):
                builder.store(total.incomings[1][0], _vector_at(builder, y_row, v), align=4)
        return context.get_dummy_value()

    return signature, generate


def _add_product(builder: ir.IRBuilder, number: ir.Value, weight: ir.Value, total: ir.Value) -> ir.Value:
    product = builder.fmul(number, weight, flags=("contract",))
    return builder.fadd(product, total, flags=("contract",))


def _add_products_of_pairs(builder: ir.IRBuilder, pair: ir.Value, weights: ir.Value, total: ir.Value) -> ir.Value:
    """As assembly, for the name and the types of the intrinsic change from one LLVM to the next."""
    if not MULTIPLIES_PAIRS:  # compiled everywhere, and run nowhere else
        trap = builder.module.declare_intrinsic("llvm.trap", (), ir.FunctionType(ir.VoidType(), ()))
        builder.call(trap, ())
        return total
    operation = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.asm(operation, "vdpbf16ps $2, $1, $0", "=v,v,v,0", (pair, weights, total), side_effect=False)


_ADD_PRODUCT = {FP32: _add_product, BF16_PAIRS: _add_products_of_pairs}


def _vector_at(builder: ir.IRBuilder, address: ir.Value, number: int) -> ir.Value:
    return builder.bitcast(builder.gep(address, [LONG(number * LANES)]), VECTOR.as_pointer())


def _in_every_lane(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    nothing, first = ir.Constant(VECTOR, ir.Undefined), ir.IntType(32)(0)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, number, first), nothing, lanes)


@intrinsic
def pointer(typing, address):
    """An address as the pointer that `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(inline="always")
def rows_times_panel(held, rows, x, x_stride, panel, y, y_stride, depth):
    """`block_of_rows` for any number of rows."""
    row = 0
    while rows - row >= ROWS:
        block_of_rows(held, ROWS, row, x, x_stride, panel, y, y_stride, depth)
        row += ROWS
    if rows - row >= 8:
        block_of_rows(held, 8, row, x, x_stride, panel, y, y_stride, depth)
        row += 8
    if rows - row >= 4:
        block_of_rows(held, 4, row, x, x_stride, panel, y, y_stride, depth)
        row += 4
    if rows - row >= 2:
        block_of_rows(held, 2, row, x, x_stride, panel, y, y_stride, depth)
        row += 2
    if rows - row >= 1:
        block_of_rows(held, 1, row, x, x_stride, panel, y, y_stride, depth)
