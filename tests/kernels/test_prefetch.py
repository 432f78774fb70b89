"""Is the next block's copy on its way during this block's product? Read from code that is known to do either."""

import os
import platform

import pytest
import torch

from minilib.kernels.flash_attention import forward
from minilib.kernels.flash_attention.tiles import CASES, build_of
from minilib.kernels.workbench import compiled
from minilib.kernels.workbench.prefetch import copies_in_flight

compiles = pytest.mark.skipif(
    platform.system() != "Linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles on Linux, uninterpreted"
)
COPY, PRODUCT, WGMMA = "cp.async.commit_group;", "mma.sync.aligned.m16n8k16", "wgmma.mma_async.sync.aligned.m64n64k16"
EXPECT, ARRIVED = "@%p1 mbarrier.arrive.expect_tx.b64 _, [%r1], 512;", "mbarrier.try_wait.parity.b64 complete, [%r1];"


def wait(left: str) -> str:
    return f"cp.async.wait_group \t{left};"


def loop(*body: str, before: tuple[str, ...] = (), label: str = "$L__BB0_1") -> str:
    return "\n".join([*before, f"{label}:", *body, f"@%p1 bra \t{label};"])


@pytest.mark.parametrize(
    ("ptx", "found"),
    [
        ("", None),
        (PRODUCT, None),  # in no loop
        (loop(COPY, wait("0")), None),  # which multiplies nothing
        (loop("ld.shared.b32 %r1, [%r2];", PRODUCT), 0),
        (loop(wait("0"), PRODUCT, COPY), 0),  # issued after the product, and waited for at once
        (loop(wait("0"), PRODUCT, "bar.sync 0;", WGMMA, COPY), 0),
        (loop(wait("1"), PRODUCT, COPY), 1),
        (loop(wait("0x2"), WGMMA, COPY, COPY), 2),
        (loop(wait("0"), COPY, PRODUCT), 1),  # issued before the product
        (loop(PRODUCT, COPY, wait("1")), 1),  # waited for at the end of the round before
        (loop(PRODUCT, COPY, "cp.async.wait_all;"), 0),
        (loop(wait("1"), PRODUCT, wait("0"), PRODUCT, COPY, COPY), 0),  # K, then V of the same block
        (loop(wait("3"), PRODUCT, wait("2"), PRODUCT, COPY, COPY), 2),
        (loop(COPY, PRODUCT), 0),  # nothing waits for it in this loop, so it is not for its products
        (loop(ARRIVED, WGMMA, EXPECT, before=(EXPECT,)), 0),
        (loop(ARRIVED, WGMMA, EXPECT, before=(EXPECT, EXPECT)), 1),
        (loop(ARRIVED, EXPECT, WGMMA, before=(EXPECT,)), 1),
        (loop(ARRIVED, WGMMA, ARRIVED, WGMMA, EXPECT, EXPECT, before=(EXPECT,) * 4), 2),
        (loop(ARRIVED, WGMMA, EXPECT, before=(EXPECT, ARRIVED, EXPECT)), 0),  # Q came so, too, and is there
        ("\n".join([loop(wait("2"), PRODUCT, COPY), loop(wait("0"), PRODUCT, COPY, label="$L__BB0_2")]), 0),
        (loop(loop(wait("2"), PRODUCT, COPY, label="$L__BB0_2"), wait("0"), before=(COPY,)), 2),  # the inner one counts
        ("\n".join([loop(ARRIVED, WGMMA, EXPECT, before=(EXPECT,) * 2),
                    loop(ARRIVED, WGMMA, EXPECT, before=(EXPECT,), label="$L__BB0_2")]), 0),
    ],
)  # fmt: skip
def test_groups_in_flight_are_counted_at_a_blocks_first_product(ptx, found):
    assert copies_in_flight(ptx) == found


SOURCE = """
@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, k, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, k, BLOCK):
        a = tl.load(a_ptr + row * k + begin + column)
        b = tl.load(b_ptr + (begin + row) * BLOCK + column)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + row * BLOCK + column, total)
"""


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("stages", "blocks"), [(1, 0), (3, 1), (4, 2)])
def test_a_product_has_as_many_blocks_on_their_way_as_it_has_buffers_to_spare(target, stages, blocks):
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*bf16") | {"k": "i32"}
    build = {"kernel": "multiply", "name": "multiply", "types": types, "constants": {"BLOCK": 64}, "aligned": ["k"]}
    assert compiled.report_source(target, SOURCE, build | {"num_stages": stages}).copies_in_flight == 2 * blocks


@compiles
@pytest.mark.parametrize(("stages", "groups"), [(2, 0), (3, 1)])
def test_with_two_stages_flash_attention_on_hopper_prefetches_nothing(stages, groups):
    """The fault that this reader was written for; K and V of a block come through the copy engine as one group."""
    tile = forward.choose_tile(128, torch.bfloat16, "sm_90") | {"num_stages": stages}
    report = compiled.report("sm_90", build_of(forward.forward, "forward", CASES[0], tile, copied=("k", "v")))
    assert report.copies_in_flight == groups and report.spilled == 0


@compiles
def test_amds_code_has_no_such_copies():
    build = forward.builds("gfx942")[0]
    assert compiled.report("gfx942", build).copies_in_flight is None
