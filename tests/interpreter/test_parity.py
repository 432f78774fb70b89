"""Every kernel's own code, run by Triton's interpreter, against its oracle.

The interpreter must be chosen before Triton is imported: `make test` runs this folder with TRITON_INTERPRET=1.
"""

import pytest

from minilib.kernels.workbench.dispatch import interpreted
from tests.kernels import parity
from tests.kernels.place import Place

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # NumPy's, for a NaN that is meant to be one
]
CASES = parity.every_case()


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_agrees_with_its_oracle(case):
    CASES[case](Place("cpu", interpret=True))


def test_bf16_dots_are_still_broken_here():
    """A canary: once this fails, the interpreter has been mended, and `dispatch.upcasts` can go."""
    import torch
    import triton
    import triton.language as tl

    def multiply(left_ptr, right_ptr, product_ptr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(product_ptr + at, tl.dot(tl.load(left_ptr + at), tl.load(right_ptr + at)))

    multiply.__globals__["tl"] = tl
    left, right = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = torch.zeros(16, 16)
    triton.jit(multiply)[(1,)](left, right, product)
    assert not torch.allclose(product, left.float() @ right.float(), atol=0.1), "bf16 tl.dot works: drop the upcasts"
