import platform

import numpy as np
import pytest

from minilib.numbers.probes import chase

linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in chase._LOOP,
    reason="random access is probed on Linux x86-64 and arm64 only",
)


def follow(ring: np.ndarray, start: int, steps: int) -> int:
    """The chain followed in Python: the oracle for the machine code."""
    words = ring.reshape(-1)
    at = start
    for _ in range(steps):
        at = int(words[(at - ring.ctypes.data) // 8])
    return at


@pytest.mark.parametrize("lines", [2, 3, 63, 64, 65, 1000])
def test_the_ring_visits_every_line_once_and_comes_back(lines):
    ring, start = chase._ring(lines, seed=1)
    seen = set()
    at = start
    for _ in range(lines):
        assert at % chase.LINE == 0
        seen.add(at)
        at = follow(ring, at, 1)
    assert len(seen) == lines
    assert at == start


@linux
@pytest.mark.parametrize(("lines", "steps"), [(2, 1), (3, 4), (100, 99), (100, 100), (1000, 12345)])
def test_the_machine_code_follows_the_chain_as_python_does(lines, steps):
    ring, start = chase._ring(lines, seed=2)
    assert chase._machine_code()(start, steps) == follow(ring, start, steps)


@linux
def test_memory_is_slower_than_the_first_cache():
    assert chase.random_access(256 * 2**20) > 5 * chase.random_access(4096)


@pytest.mark.parametrize("size", [0, 64, 127, -1])
def test_a_chain_needs_two_lines(size):
    with pytest.raises(ValueError, match="at least two lines"):
        chase.random_access(size)


def test_other_platforms_are_told_why(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(chase.UnsupportedProbe, match="Linux x86-64 and arm64"):
        chase.random_access(4096)
