"""The pointer chase as a Triton kernel: one program, one load at a time, each address the value of the load before."""

import triton
import triton.language as tl


@triton.jit
def walk(ring_ptr, last_ptr, steps):
    """Follow `steps` links of the ring from word 0 and store where that ends.

    Args:
        ring_ptr: int64 words; the first word of each line holds the index of the next line's first word.
        last_ptr: one int64 that receives the final index, so that the chain cannot be optimised away.
        steps: number of loads.
    """
    at = tl.load(ring_ptr)
    for _ in range(1, steps):
        at = tl.load(ring_ptr + at)
    tl.store(last_ptr, at)
