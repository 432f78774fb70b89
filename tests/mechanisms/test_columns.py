"""Ranges of columns against what they must cover."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.sharding.columns import DoesNotDivide, column_ranges, num_copies


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_every_column_is_with_one_shard_or_with_as_many_as_every_other(size, factor, copied):
    columns, shards = (factor, size * factor) if copied else (size * factor, factor)
    ranges = column_ranges(columns, shards, copies=copied)
    assert len(ranges) == shards and len({len(each) for each in ranges}) == 1
    flat = [column for each in ranges for column in each]
    copies = size if copied else 1
    assert flat == [column for column in range(columns) for _ in range(copies)]
    assert num_copies(ranges) == copies


@pytest.mark.parametrize(
    ("columns", "shards", "copies", "message"),
    [
        (10, 4, False, "10 heads cannot be dealt to 4 shards; make it a multiple of 4"),
        (2, 4, False, "2 heads cannot be dealt to 4 shards; make it a multiple of 4"),
        (3, 4, True, "3 heads cannot be dealt to 4 shards; make it a multiple or a divisor of 4"),
        (6, 4, True, "6 heads cannot be dealt to 4 shards; make it a multiple or a divisor of 4"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(columns, shards, copies, message):
    with pytest.raises(DoesNotDivide, match=message):
        column_ranges(columns, shards, "heads", copies=copies)


@pytest.mark.parametrize(("columns", "shards"), [(0, 2), (2, 0), (-4, 2)])
def test_nothing_to_deal_is_refused(columns, shards):
    with pytest.raises(ValueError, match="1 or more"):
        column_ranges(columns, shards)
