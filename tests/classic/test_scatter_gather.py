"""Sharded tables against torch's products and log_softmax, and against counted rounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.scatter_gather import NUMBER_BYTES, PartialAnswers, QueryTraffic, TableShards
from minilib.mechanisms.sharding.columns import DoesNotDivide

TABLE = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NEXT = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BASKET = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def asked(shards: TableShards) -> QueryTraffic:
    shards.check_invariants()
    return shards.traffic


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 12, 24])
def test_by_column_answers_are_concatenated(tmp_path, num_shards):
    with TableShards(tmp_path, TABLE.tolist(), num_shards) as shards:
        assert shards.totals(BASKET.tolist()) == pytest.approx((BASKET @ TABLE).tolist(), rel=1e-12)
        # Of the 24 shards only the 12 with a column's first copy are asked: a copy's answer counted twice is wrong.
        assert asked(shards) == QueryTraffic(min(num_shards, 12), rounds=1, answer_bytes=12 * NUMBER_BYTES)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 9])
def test_by_row_answers_are_added(tmp_path, num_shards):
    with TableShards(tmp_path, TABLE.tolist(), num_shards, by="row") as shards:
        assert shards.totals(BASKET.tolist()) == pytest.approx((BASKET @ TABLE).tolist(), rel=1e-12)
        with_rows = sum(len(part) > 0 for part in shards.parts)
        assert asked(shards).rounds == 1 and shards.traffic.answer_bytes == with_rows * 12 * NUMBER_BYTES
        with pytest.raises(PartialAnswers, match="cut by column"):
            shards.log_share(BASKET.tolist(), 0)


@pytest.mark.parametrize("num_shards", [1, 2, 4, 24])
def test_two_tables_take_one_round_and_no_total_leaves_its_shard(tmp_path, num_shards):
    with TableShards(tmp_path, TABLE.tolist(), num_shards, then=NEXT.tolist()) as shards:
        expected = (BASKET @ TABLE).clamp_min(0) @ NEXT
        assert shards.chained(BASKET.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)
        distinct = min(num_shards, 12)
        assert asked(shards) == QueryTraffic(distinct, rounds=1, answer_bytes=distinct * 5 * NUMBER_BYTES)


@pytest.mark.parametrize("num_shards", [1, 3, 24])
def test_a_share_takes_two_rounds_of_few_numbers(tmp_path, num_shards):
    baskets = (BASKET, 1000 * BASKET)  # without the maximum, exp of the latter overflows
    with TableShards(tmp_path, TABLE.tolist(), num_shards) as shards:
        for basket in baskets:
            for column in (0, 5, 11):
                expected = (basket @ TABLE).log_softmax(0)[column].item()
                assert shards.log_share(basket.tolist(), column) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        calls, distinct = 6, min(num_shards, 12)
        assert asked(shards) == QueryTraffic(2 * calls * distinct, 2 * calls, 3 * calls * distinct * NUMBER_BYTES)
        with pytest.raises(IndexError, match="no column 12"):
            shards.log_share(BASKET.tolist(), 12)


NUMBERS = st.floats(-100, 100)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_table(tmp_path_factory, data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 4]))
    table = data.draw(st.lists(st.lists(NUMBERS, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    weights = data.draw(st.lists(NUMBERS, min_size=rows, max_size=rows))
    expected = [math.fsum(w * row[column] for w, row in zip(weights, table, strict=True)) for column in range(columns)]
    for by in ("row", "column"):
        with TableShards(tmp_path_factory.mktemp(by), table, 4, by) as shards:
            assert shards.totals(weights) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        ([[1.0] * 10], {}, DoesNotDivide, "10 columns cannot be dealt to 4 shards"),
        ([], {}, ValueError, "rows of one length"),
        ([[]], {}, ValueError, "rows of one length"),
        ([[1.0], [1.0, 2.0]], {}, ValueError, "lengths \\[1, 2\\]"),
        ([[math.nan]], {}, ValueError, "not finite"),
        ([[1.0]], {"by": "cell"}, ValueError, "by is 'column' or 'row', got 'cell'"),
        ([[1.0]], {"by": "row", "then": [[1.0]]}, ValueError, "by row"),
        ([[1.0]], {"then": [[1.0], [2.0]]}, ValueError, "got 2 rows"),
    ],
)
def test_refusals(tmp_path, table, options, error, message):
    with pytest.raises(error, match=message):
        TableShards(tmp_path, table, 4, **options)


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.inf]])
def test_weights_that_fit_no_table_are_refused(tmp_path, weights):
    with TableShards(tmp_path, [[1.0], [2.0]], 1) as shards, pytest.raises(ValueError, match="2 finite numbers"):
        shards.totals(weights)


def test_without_a_second_table_nothing_is_chained(tmp_path):
    with TableShards(tmp_path, [[1.0]], 1) as shards, pytest.raises(ValueError, match="no second table"):
        shards.chained([1.0])
