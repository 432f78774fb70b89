"""The meter itself: bytes against what can be counted by hand, and each fault that it is there to catch."""

import pytest
import torch

from minilib.kernels.workbench.dispatch import interpreted
from minilib.kernels.workbench.traffic import count_traffic

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it")
if interpreted():
    import triton
    import triton.language as tl

    @triton.jit
    def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = at < n if MASKED else at < n + BLOCK
        x = tl.load(x_ptr + at, mask=there, other=0.0)
        tl.store(out_ptr + at, x + tl.load(y_ptr + at, mask=there, other=0.0), mask=there)

    @triton.jit
    def total(x_ptr, out_ptr, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        part = tl.sum(tl.load(x_ptr + at, mask=at < n, other=0.0))
        if ATOMIC:
            tl.atomic_add(out_ptr, part)
        else:
            tl.store(out_ptr, tl.load(out_ptr) + part)


@pytest.mark.parametrize("n", (1, 31, 32, 33, 100))
def test_bytes_are_those_counted_by_hand(n):
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    with count_traffic(("out",), x=x, y=y, out=out) as traffic:
        add[(triton.cdiv(n, 32),)](x, y, out, n, 32, True)
    assert (traffic.loaded, traffic.stored, traffic.bytes) == (8 * n, 4 * n, 12 * n)
    assert (traffic.loads, traffic.stores) == (2 * traffic.programs, traffic.programs)
    assert traffic.touched == {"x": 4 * n, "y": 4 * n, "out": 4 * n}
    assert traffic.outside == traffic.races == traffic.unwritten == 0
    assert torch.equal(out, x + y)


def test_accesses_beyond_the_end_are_counted_and_not_carried_out():
    x, y, out = torch.randn(100), torch.randn(100), torch.empty(100)
    with count_traffic((), x=x, y=y, out=out) as traffic:
        add[(4,)](x, y, out, 100, 32, False)
    assert traffic.outside == 3 * 28 and torch.equal(out, x + y)


def test_a_race_shows_and_an_atomic_addition_is_none():
    x = torch.randn(100)
    for atomic, races in ((False, 1), (True, 0)):
        out = torch.zeros(1)
        with count_traffic((), x=x, out=out) as traffic:
            total[(4,)](x, out, 100, 32, atomic)
        assert traffic.races == races
        assert torch.allclose(out, x.sum(), atol=1e-4)  # the interpreter's order hides the race


def test_launches_wait_for_one_another():
    x, out = torch.randn(20), torch.zeros(1)
    with count_traffic((), x=x, out=out) as traffic:
        for _ in range(3):
            total[(1,)](x, out, 20, 32, False)
    assert traffic.races == 0 and traffic.programs == 3


def test_reading_what_nobody_wrote_shows():
    x, out = torch.randn(20), torch.empty(1)
    with count_traffic(("out",), x=x, out=out) as traffic:
        total[(1,)](x, out, 20, 32, False)
    assert traffic.unwritten == 1


def test_the_meter_is_gone_after_the_block_even_if_it_fails():
    x = torch.randn(20)
    with pytest.raises(ZeroDivisionError), count_traffic((), x=x) as traffic:
        raise ZeroDivisionError
    total[(1,)](x, torch.zeros(1), 20, 32, False)
    assert traffic.bytes == 0


def test_nothing_to_watch_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"), count_traffic():
        pass
