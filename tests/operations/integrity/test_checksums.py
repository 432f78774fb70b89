"""Checksums of bytes: every bit counts, and nothing but bytes, dtype and shape does."""

import random

import pytest
import torch

from minilib.operations.integrity import combined_checksum, content_checksum, flip_bit
from minilib.operations.integrity.verdict import IntegrityVerdict, suspects_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    before, seen = content_checksum(tensor), set()
    for bit in range(8 * tensor.nbytes):
        if dtype == torch.bool and bit % 8:
            continue  # no value that torch knows
        flip_bit(tensor, bit)
        seen.add(content_checksum(tensor))
        flip_bit(tensor, bit)
        assert content_checksum(tensor) == before
    assert before not in seen and len(seen) == (15 if dtype == torch.bool else 8 * tensor.nbytes)


def test_bytes_are_compared_and_not_values():
    nan, other = torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])
    assert not torch.equal(nan, other) and content_checksum(nan) == content_checksum(other)
    flip_bit(other, 0)  # another payload of the same NaN
    assert other.isnan()[0] and content_checksum(nan) != content_checksum(other)
    zero, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert torch.equal(zero, minus) and content_checksum(zero) != content_checksum(minus)


def test_layout_does_not_matter_and_dtype_and_shape_do():
    tensor = torch.arange(12.0).view(3, 4)
    assert content_checksum(tensor.t().contiguous().t()) == content_checksum(tensor)
    assert content_checksum(tensor[:, ::2]) == content_checksum(tensor[:, ::2].clone())
    assert content_checksum(tensor.requires_grad_()) == content_checksum(tensor.detach())
    others = {content_checksum(tensor.detach().view(shape)) for shape in ((3, 4), (4, 3), (12,))}
    others.add(content_checksum(tensor.detach().view(torch.int32)))
    assert len(others) == 4
    empty = {content_checksum(torch.empty(0)), content_checksum(torch.empty(0, 3)), content_checksum(torch.tensor(0.0))}
    assert len(empty) == 3
    assert all(-(2**63) <= each < 2**63 for each in others)


def test_names_count_and_their_order_does_not():
    assert combined_checksum({"a": 1, "b": 2}) == combined_checksum({"b": 2, "a": 1})
    assert len({combined_checksum(each) for each in ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, {})}) == 4


def test_a_bit_that_is_not_there():
    for bit in (-1, 32):
        with pytest.raises(ValueError, match=f"no bit {bit} in 4"):
            flip_bit(torch.zeros(1), bit)
    with pytest.raises(ValueError, match="contiguous"):
        flip_bit(torch.zeros(4, 4)[:, 0], 0)


def test_a_majority_names_and_less_than_that_does_not():
    assert suspects_of([5, 5, 5], (0, 1, 2)) == ((), False)
    assert suspects_of([5, 7, 5], (0, 1, 2)) == ((1,), True)
    assert suspects_of([5, 7, 9], (3, 4, 5)) == ((3, 4, 5), False)
    assert suspects_of([5, 7], (0, 2)) == ((0, 2), False)
    assert suspects_of([5, 5, 7, 7], range(4)) == ((0, 1, 2, 3), False)
    assert suspects_of([5, 5, 5, 7, 9], range(5)) == ((3, 4), True)
    assert suspects_of([5], (0,)) == ((), False)
    rng = random.Random(0)
    for _ in range(100):
        wrong = set(rng.sample(range(7), rng.randrange(4)))
        told = [100 + rank if rank in wrong else 1 for rank in range(7)]
        assert set(suspects_of(told, range(7))[0]) == wrong


def test_a_verdict_says_what_it_found():
    assert str(IntegrityVerdict(3)) == "step 3: replicas agree" and IntegrityVerdict(3).agreed
    assert str(IntegrityVerdict(3, (1,), True, ("w",))) == "step 3: rank 1 differs from the others, in w"
    assert str(IntegrityVerdict(3, (0, 1))) == "step 3: one of the ranks 0, 1 is wrong"
