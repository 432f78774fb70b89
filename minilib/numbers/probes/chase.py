"""Random access as the processor sees it: a chain of loads in which each address is the value of the load before.

Python takes tens of nanoseconds a step, longer than the caches it would time, and a vectorised gather overlaps its
misses. So the loop is four machine instructions, placed in executable memory and called through ctypes. Nothing is
compiled, and nothing else runs between two loads.

Limits: every line of the ring is touched once per lap, so hardware prefetchers learn nothing and the TLB misses that
such an access pattern really has are part of the result (with 4 KiB pages, beyond a few MiB, they dominate).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time

import numpy as np

from minilib.mechanisms.basics.arithmetic import ceil_div

LINE = 64  # bytes; the cache line of every x86-64 and nearly every arm64 server
MIN_STEPS, MAX_STEPS = 1 << 17, 1 << 20

_LOOP = {  # start address and step count in, last address out, in the platform's C calling convention
    "x86_64": bytes.fromhex(
        "488b3f"  # again: mov rdi, [rdi]
        "48ffce"  #        dec rsi
        "75f8"  #        jnz again
        "4889f8"  #        mov rax, rdi
        "c3"  #        ret
    ),
    "aarch64": bytes.fromhex(
        "000040f9"  # again: ldr  x0, [x0]
        "210400f1"  #        subs x1, x1, #1
        "c1ffff54"  #        b.ne again
        "c0035fd6"  #        ret
    ),
}


class UnsupportedProbe(RuntimeError):
    """This machine cannot be asked this question; the message says why."""


def random_access(working_set: int, seed: int = 0) -> float:
    """Seconds per dependent load from a random place in `working_set` bytes.

    Args:
        working_set: bytes the chain wanders over, at least two cache lines.
        seed: of the random order.

    Returns:
        Seconds per load, the fastest of three runs: a load cannot be faster than the hardware, only disturbed.

    Raises:
        UnsupportedProbe: if this platform is not Linux on x86-64 or arm64, or forbids executable memory.
        ValueError: if the working set has no room for two lines.

    Cost:
        memory working_set bytes; at most 3 × 2²⁰ loads, 0.5 s where a load takes 150 ns.
    """
    lines = working_set // LINE
    if lines < 2:
        raise ValueError(f"a chain needs at least two lines of {LINE} bytes, got a working set of {working_set} bytes")
    ring, start = _ring(lines, seed)
    walk = _machine_code()
    steps = min(MAX_STEPS, max(MIN_STEPS, lines))
    walk(start, min(lines, MAX_STEPS))  # bring the ring into whichever cache can hold it
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        walk(start, steps)
        best = min(best, (time.perf_counter() - started) / steps)
    assert ring is not None, "the ring must outlive the walk"
    return best


def _ring(lines: int, seed: int) -> tuple[np.ndarray, int]:
    """One cycle through all lines in random order; the first word of a line holds the address of the next line."""
    order = np.random.default_rng(seed).permutation(lines)
    ring = np.zeros((lines + 1, LINE // 8), dtype=np.uint64)
    base = ceil_div(ring.ctypes.data, LINE) * LINE  # numpy aligns to 16 bytes; a line starts at a multiple of 64
    offset = (base - ring.ctypes.data) // 8
    first_words = ring.reshape(-1)[offset : offset + lines * (LINE // 8) : LINE // 8]
    first_words[order] = base + np.roll(order, -1).astype(np.uint64) * np.uint64(LINE)
    return ring, base + int(order[0]) * LINE


def _machine_code():
    """The loop as a Python callable ``walk(start_address, steps)``."""
    code = _LOOP.get(platform.machine())
    if platform.system() != "Linux" or code is None:
        raise UnsupportedProbe(f"random access is probed on Linux x86-64 and arm64, this is {platform.platform()}")
    file = os.memfd_create("chase")
    try:
        os.write(file, code)
        memory = mmap.mmap(file, len(code), prot=mmap.PROT_READ | mmap.PROT_EXEC)
    except OSError as error:
        raise UnsupportedProbe(f"this system forbids executable memory ({error})") from error
    finally:
        os.close(file)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)(address)
    function.memory = memory  # unmapped when the function goes, not before
    return function
