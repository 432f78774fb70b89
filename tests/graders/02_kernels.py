"""Answers to 02_kernels that its graders must tell apart."""

from tests.graders.answers import Answers

MASKED = """
@triton.jit
def scale_relu(x_ptr, out_ptr, n, a, b, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    x = tl.load(x_ptr + at, mask=there, other=0.0)
    y = a * x + b
    tl.store(out_ptr + at, tl.where(y > 0, y, 0.0), mask=there)
"""

DETECTOR = """
def diagnose(run):
    found = {"outside": 0, "race": 0, "unwritten": 0}
    for n in [1, 5, 64, 129, 256, 257, 511, 777, 1024]:
        x, out = torch.randn(n), torch.zeros(n)
        with count_traffic(("out",), x=x, out=out) as traffic:
            run(x, out)
        found["outside"] += traffic.outside
        found["race"] += traffic.races
        found["unwritten"] += traffic.unwritten
    return {fault for fault, count in found.items() if count}
"""

ROWS = """
def log_softmax(x, temperature, out):
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    one_row[(rows,)](x, out, columns, x.stride(0), out.stride(0), 1 / temperature, BLOCK=block)

@triton.jit
def one_row(x_ptr, out_ptr, columns, stride_x, stride_out, scale, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0) * stride_x
    out_ptr += tl.program_id(0) * stride_out
    at = tl.arange(0, BLOCK)
    there = at < columns
    x = tl.load(x_ptr + at, mask=there, other=0.0) * scale
    x = tl.where(there, x, -float("inf"))
    top = tl.max(x, 0)
    total = tl.sum(tl.where(there, tl.exp(x - top), 0.0), 0)
    tl.store(out_ptr + at, x - (top + tl.log(total)), mask=there)
"""

CHOOSE = """
def choose_tile(m, n, k, value_bytes, budget, blocks):
    down = lambda bm: (m + bm - 1) // bm
    across = lambda bn: (n + bn - 1) // bn
    loaded = lambda bm, bn: (m * k * across(bn) + k * n * down(bm)) * value_bytes
    computed = lambda bm, bn: down(bm) * bm * across(bn) * bn
    tiles = []
    for bm in sorted(blocks):
        for bn in sorted(blocks):
            for bk in sorted(blocks, reverse=True):
                shared = budget.stages * value_bytes * (bm * bk + bk * bn)
                if shared <= budget.shared_bytes and bm * bn * 4 <= budget.accumulator_bytes:
                    tiles.append((bm, bn, bk))
    if not tiles:
        return None
    tiles.sort(key=lambda t: (loaded(t[0], t[1]), computed(t[0], t[1]), -t[2], t[0]))
    best = tiles[0]
    return best, loaded(best[0], best[1])
"""

SCAN = """
def exclusive_scan(x, out, scratch, block=64):
    n, blocks = len(x), len(scratch)
    totals[(blocks,)](x, scratch, n, BLOCK=block)
    scan[(1,)](scratch, blocks, BLOCK=triton.next_power_of_2(blocks))
    spread[(blocks,)](x, scratch, out, n, BLOCK=block)

@triton.jit
def totals(x_ptr, scratch_ptr, n, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    at = number * BLOCK + tl.arange(0, BLOCK)
    tl.store(scratch_ptr + number, tl.sum(tl.load(x_ptr + at, mask=at < n, other=0)))

@triton.jit
def scan(scratch_ptr, blocks, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    there = at < blocks
    tl.store(scratch_ptr + at, tl.cumsum(tl.load(scratch_ptr + at, mask=there, other=0)), mask=there)

@triton.jit
def spread(x_ptr, scratch_ptr, out_ptr, n, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    at = number * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    before = tl.load(scratch_ptr + number - 1, mask=number > 0, other=0)
    tl.store(out_ptr + at, before + (tl.cumsum(x) - x), mask=at < n)
"""


def mistaken(answer: str, step: str, mistake: str) -> str:
    """A right answer with one step replaced."""
    assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
    return answer.replace(step, mistake)


TASKS = {
    "task_1": Answers(
        correct=(
            """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        moved = kernel.value_bytes * (kernel.loads + kernel.stores)
        share = kernel.flops / moved / machine.ridge(kernel.dtype) if moved else 1.0
        if share < 1:
            found[kernel.name] = share
    return found
""",
        ),
        wrong={
            "prices everything at the tensor cores' rate": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        compute = kernel.flops / machine.peak("bf16")
        memory = (kernel.loads + kernel.stores) * kernel.value_bytes / machine.memory_bandwidth
        if memory > compute:
            found[kernel.name] = compute / memory
    return found
""",
            "counts values and not bytes": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        compute = kernel.flops / machine.peak(kernel.dtype)
        memory = (kernel.loads + kernel.stores) / machine.memory_bandwidth
        if memory > compute:
            found[kernel.name] = compute / memory
    return found
""",
            "stores are free": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        compute = kernel.flops / machine.peak(kernel.dtype)
        memory = kernel.loads * kernel.value_bytes / machine.memory_bandwidth
        if memory > compute:
            found[kernel.name] = compute / memory
    return found
""",
            "memory time over compute time": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        compute = kernel.flops / machine.peak(kernel.dtype)
        memory = (kernel.loads + kernel.stores) * kernel.value_bytes / machine.memory_bandwidth
        if memory > compute:
            found[kernel.name] = memory / compute if compute else 0.0
    return found
""",
            "at the ridge already": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        compute = kernel.flops / machine.peak(kernel.dtype)
        memory = (kernel.loads + kernel.stores) * kernel.value_bytes / machine.memory_bandwidth
        if memory >= compute:
            found[kernel.name] = compute / memory
    return found
""",
            "asks for the bound with launches in it": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        moved = (kernel.loads + kernel.stores) * kernel.value_bytes
        priced = price(Cost(flops=kernel.flops, bytes=moved, calls=1, dtype=kernel.dtype), machine)
        if priced.bound == "memory":
            found[kernel.name] = priced.terms["compute"] / priced.terms["memory"]
    return found
""",
            "always an H100": """
def memory_bound(kernels, machine):
    found = {}
    for kernel in kernels:
        compute = kernel.flops / h100.peak(kernel.dtype)
        memory = (kernel.loads + kernel.stores) * kernel.value_bytes / h100.memory_bandwidth
        if memory > compute:
            found[kernel.name] = compute / memory
    return found
""",
        },
    ),
    "task_2": Answers(
        correct=(
            MASKED,
            """
@triton.jit
def scale_relu(x_ptr, out_ptr, n, a, b, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    y = tl.load(x_ptr + first + lane, mask=lane < n - first) * a + b
    tl.store(out_ptr + first + lane, y * (y > 0), mask=lane < n - first)
""",
        ),
        wrong={
            "no mask": """
@triton.jit
def scale_relu(x_ptr, out_ptr, n, a, b, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.maximum(a * tl.load(x_ptr + at) + b, 0.0))
""",
            "only the store is masked": mistaken(
                MASKED, "tl.load(x_ptr + at, mask=there, other=0.0)", "tl.load(x_ptr + at)"
            ),
            "one value beyond the end": mistaken(MASKED, "at < n", "at <= n"),
            "clamps the addresses and masks nothing": """
@triton.jit
def scale_relu(x_ptr, out_ptr, n, a, b, BLOCK: tl.constexpr):
    at = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), n - 1)
    tl.store(out_ptr + at, tl.maximum(a * tl.load(x_ptr + at) + b, 0.0))
""",
            "full tiles only": mistaken(MASKED, "at < n", "at < n // BLOCK * BLOCK"),
            "the ReLU loads x again": mistaken(
                MASKED, "tl.where(y > 0, y, 0.0)", "tl.where(y > 0, a * tl.load(x_ptr + at, mask=there) + b, 0.0)"
            ),
            "stores first and clips what it has stored": mistaken(
                MASKED,
                "    tl.store(out_ptr + at, tl.where(y > 0, y, 0.0), mask=there)\n",
                "    tl.store(out_ptr + at, y, mask=there)\n"
                "    y = tl.load(out_ptr + at, mask=there)\n"
                "    tl.store(out_ptr + at, tl.maximum(y, 0.0), mask=there)\n",
            ),
            "a tile of 64 whatever BLOCK is": MASKED.replace("BLOCK +", "64 +").replace(
                "arange(0, BLOCK)", "arange(0, 64)"
            ),
            "clips x and not the result": mistaken(MASKED, "tl.where(y > 0, y, 0.0)", "a * tl.maximum(x, 0.0) + b"),
        },
    ),
    "task_3": Answers(
        correct=(DETECTOR,),
        wrong={
            "tests on the friendly size alone": mistaken(
                DETECTOR, "[1, 5, 64, 129, 256, 257, 511, 777, 1024]", "[1024]"
            ),
            "one ragged size": mistaken(DETECTOR, "[1, 5, 64, 129, 256, 257, 511, 777, 1024]", "[1000]"),
            "no length below one block": mistaken(DETECTOR, "[1, 5, 64, ", "["),
            "no exact multiple": mistaken(
                DETECTOR, "[1, 5, 64, 129, 256, 257, 511, 777, 1024]", "[1, 5, 129, 257, 777]"
            ),
            "never more than one block": mistaken(DETECTOR, "256, 257, 511, 777, 1024]", "256]"),
            "does not say that out is fresh": mistaken(DETECTOR, '("out",)', "()"),
            "x counts as unwritten, too": mistaken(DETECTOR, '("out",)', '("x", "out")'),
            "one fault hides another": """
def diagnose(run):
    for n in [1, 5, 64, 129, 256, 257, 511, 777, 1024]:
        x, out = torch.randn(n), torch.zeros(n)
        with count_traffic(("out",), x=x, out=out) as traffic:
            run(x, out)
        if traffic.outside:
            return {"outside"}
        if traffic.races:
            return {"race"}
        if traffic.unwritten:
            return {"unwritten"}
    return set()
""",
            "knows the four by name": """
def diagnose(run):
    return {"negate": {"outside"}, "running_total": {"race"}, "add_half": {"unwritten"}}.get(run.__name__, set())
""",
        },
    ),
    "task_4": Answers(
        correct=(
            ROWS,
            """
def log_softmax(x, temperature, out):
    tile = triton.next_power_of_2(x.shape[1])
    kernel[(x.shape[0],)](x, x.stride(0), out, out.stride(0), x.shape[1], temperature, tile)

@triton.jit
def kernel(x_ptr, x_stride, out_ptr, out_stride, n, temperature, TILE: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < n, other=-float("inf"))
    x = (x - tl.max(x, 0)) / temperature * 1.4426950408889634
    out = (x - tl.log2(tl.sum(tl.exp2(x), 0))) * 0.6931471805599453
    tl.store(out_ptr + row * out_stride + at, out, mask=at < n)
""",
        ),
        wrong={
            "lanes without a value count as a score of 0": mistaken(
                mistaken(ROWS, '    x = tl.where(there, x, -float("inf"))\n', ""),
                "tl.where(there, tl.exp(x - top), 0.0)",
                "tl.exp(x - top)",
            ),
            "lanes without a value set the maximum": mistaken(ROWS, '    x = tl.where(there, x, -float("inf"))\n', ""),
            "does not subtract the maximum": mistaken(ROWS, "top = tl.max(x, 0)", "top = 0.0"),
            "multiplies by the temperature": mistaken(ROWS, "1 / temperature", "temperature"),
            "temperature after the maximum": mistaken(
                mistaken(ROWS, ", other=0.0) * scale", ", other=0.0)"), "tl.exp(x - top)", "tl.exp((x - top) * scale)"
            ),
            "takes rows for neighbours": mistaken(ROWS, "x.stride(0), out.stride(0)", "columns, columns"),
            "uses the stride of x for out": mistaken(ROWS, "x.stride(0), out.stride(0)", "x.stride(0), x.stride(0)"),
            "the logarithm of a softmax": mistaken(
                ROWS, "x - (top + tl.log(total))", "tl.log(tl.exp(x - top) / total)"
            ),
            "three passes": """
def log_softmax(x, temperature, out):
    one_row[(len(x),)](x, out, x.shape[1], x.stride(0), out.stride(0), temperature, BLOCK=32)

@triton.jit
def one_row(x_ptr, out_ptr, columns, stride_x, stride_out, temperature, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0) * stride_x
    out_ptr += tl.program_id(0) * stride_out
    top, total = -float("inf"), 0.0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < columns, other=-float("inf")) / temperature
        top = tl.maximum(top, tl.max(x, 0))
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < columns, other=-float("inf")) / temperature
        total += tl.sum(tl.exp(x - top), 0)
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < columns, other=-float("inf")) / temperature
        tl.store(out_ptr + at, x - top - tl.log(total), mask=at < columns)
""",
            "lets torch do it": """
def log_softmax(x, temperature, out):
    out.copy_((x / temperature).log_softmax(dim=1))
""",
        },
    ),
    "task_5": Answers(
        correct=(
            CHOOSE,
            """
import math
from itertools import product

def choose_tile(m, n, k, value_bytes, budget, blocks):
    def room(tile):
        bm, bn, bk = tile
        operands = bm * bk + bk * bn
        return (
            budget.stages * operands * value_bytes <= budget.shared_bytes and bm * bn <= budget.accumulator_bytes // 4
        )

    def loaded(tile):
        total = 0
        for column in range(0, n, tile[1]):
            total += m * k * value_bytes
        for row in range(0, m, tile[0]):
            total += k * n * value_bytes
        return total

    def rank(tile):
        bm, bn, bk = tile
        return loaded(tile), math.ceil(m / bm) * math.ceil(n / bn) * bm * bn, -bk, bm

    best = min(filter(room, product(blocks, repeat=3)), key=rank, default=None)
    return None if best is None else (best, loaded(best))
""",
        ),
        wrong={
            "A once for each row of tiles, B once for each column": mistaken(
                CHOOSE, "m * k * across(bn) + k * n * down(bm)", "m * k * down(bm) + k * n * across(bn)"
            ),
            "masked lanes load, too": mistaken(
                CHOOSE,
                "(m * k * across(bn) + k * n * down(bm))",
                "down(bm) * across(bn) * (bm + bn) * k",
            ),
            "forgets the last, ragged tile": mistaken(
                mistaken(CHOOSE, "(m + bm - 1) // bm", "max(1, m // bm)"), "(n + bn - 1) // bn", "max(1, n // bn)"
            ),
            "sums in the dtype of the operands": mistaken(CHOOSE, "bm * bn * 4", "bm * bn * value_bytes"),
            "one stage": mistaken(CHOOSE, "budget.stages * value_bytes", "value_bytes"),
            "counts values and not bytes": mistaken(CHOOSE, "k * n * down(bm)) * value_bytes", "k * n * down(bm))"),
            "the first of equals": mistaken(
                mistaken(CHOOSE, ", computed(t[0], t[1]), -t[2], t[0])", ")"), "sorted(blocks, reverse=True)", "blocks"
            ),
            "of equals the largest tile": mistaken(
                CHOOSE, "computed(t[0], t[1]), -t[2], t[0]", "-computed(t[0], t[1]), -t[2], t[0]"
            ),
            "the largest tile that has room": mistaken(
                CHOOSE, "(loaded(t[0], t[1]), computed(t[0], t[1]), -t[2], t[0])", "(-t[0] * t[1], -t[2], t[0])"
            ),
            "square tiles only": mistaken(
                CHOOSE, "if shared <= budget.shared_bytes", "if bm == bn and shared <= budget.shared_bytes"
            ),
            "a budget must not be met exactly": mistaken(CHOOSE, "shared <= budget", "shared < budget"),
        },
    ),
    "task_6": Answers(
        correct=(
            SCAN,
            """
def exclusive_scan(x, out, scratch, block=64):
    sum_blocks[(len(scratch),)](x, scratch, len(x), block)
    chain[(1,)](scratch, len(scratch))
    finish[(len(scratch),)](x, scratch, out, len(x), block)

@triton.jit
def sum_blocks(x_ptr, scratch_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scratch_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at, mask=at < n, other=0), 0))

@triton.jit
def chain(scratch_ptr, blocks):
    before = 0
    for i in range(blocks):
        total = tl.load(scratch_ptr + i)
        tl.store(scratch_ptr + i, before)
        before += total

@triton.jit
def finish(x_ptr, scratch_ptr, out_ptr, n, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + at, mask=first + at < n, other=0)
    upto = tl.cumsum(x, 0) + tl.load(scratch_ptr + tl.program_id(0))
    tl.store(out_ptr + first + at, upto - x, mask=first + at < n)
""",
        ),
        wrong={
            "inclusive": mistaken(SCAN, "before + (tl.cumsum(x) - x)", "before + tl.cumsum(x)"),
            "adds the block's own total as well": mistaken(
                SCAN, "tl.load(scratch_ptr + number - 1, mask=number > 0, other=0)", "tl.load(scratch_ptr + number)"
            ),
            "reads the total before the first": mistaken(SCAN, "number - 1, mask=number > 0, other=0)", "number - 1)"),
            "never scans the totals": mistaken(
                SCAN, "    scan[(1,)](scratch, blocks, BLOCK=triton.next_power_of_2(blocks))\n", ""
            ),
            "scans only as many totals as a block has values": mistaken(
                SCAN, "BLOCK=triton.next_power_of_2(blocks)", "BLOCK=block"
            ),
            "sums lanes that are not there": mistaken(
                SCAN, "tl.sum(tl.load(x_ptr + at, mask=at < n, other=0))", "tl.sum(tl.load(x_ptr + at))"
            ),
            "one program for everything": """
def exclusive_scan(x, out, scratch, block=64):
    walk[(1,)](x, out, len(x), BLOCK=block)

@triton.jit
def walk(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    carry = 0
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0)
        tl.store(out_ptr + at, carry + tl.cumsum(x, 0) - x, mask=at < n)
        carry += tl.sum(x, 0)
""",
            "a chain through scratch within one launch": """
def exclusive_scan(x, out, scratch, block=64):
    chained[(len(scratch),)](x, out, scratch, len(x), BLOCK=block)

@triton.jit
def chained(x_ptr, out_ptr, scratch_ptr, n, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    at = number * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    before = tl.load(scratch_ptr + number - 1, mask=number > 0, other=0)
    tl.store(scratch_ptr + number, before + tl.sum(x, 0))
    tl.store(out_ptr + at, before + tl.cumsum(x, 0) - x, mask=at < n)
""",
            "scans every block into out and adds to it later": """
def exclusive_scan(x, out, scratch, block=64):
    n, blocks = len(x), len(scratch)
    scan_each[(blocks,)](x, out, scratch, n, BLOCK=block)
    scan_totals[(1,)](scratch, blocks, BLOCK=triton.next_power_of_2(blocks))
    add_before[(blocks,)](out, scratch, n, BLOCK=block)

@triton.jit
def scan_each(x_ptr, out_ptr, scratch_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + at, tl.cumsum(x, 0) - x, mask=at < n)
    tl.store(scratch_ptr + tl.program_id(0), tl.sum(x, 0))

@triton.jit
def scan_totals(scratch_ptr, blocks, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    totals = tl.load(scratch_ptr + at, mask=at < blocks, other=0)
    tl.store(scratch_ptr + at, tl.cumsum(totals, 0) - totals, mask=at < blocks)

@triton.jit
def add_before(out_ptr, scratch_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(scratch_ptr + tl.program_id(0))
    tl.store(out_ptr + at, before + tl.load(out_ptr + at, mask=at < n, other=0), mask=at < n)
""",
            "every program adds up all of x before its block": """
def exclusive_scan(x, out, scratch, block=64):
    alone[(len(scratch),)](x, out, len(x), BLOCK=block)

@triton.jit
def alone(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    before = 0
    for i in range(0, number):
        before += tl.sum(tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK)), 0)
    at = number * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + at, before + tl.cumsum(x, 0) - x, mask=at < n)
""",
            "lets torch do the sums": """
def exclusive_scan(x, out, scratch, block=64):
    out.copy_(x.cumsum(0) - x)
""",
        },
    ),
}
