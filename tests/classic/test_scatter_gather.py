"""Sharded tables against torch's products and log_softmax, and against counted rounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.scatter_gather import NUMBER_BYTES, PartialAnswers, QueryTraffic, TableShards, TotalOverflows
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
        for column in (-1, 12):
            with pytest.raises(IndexError, match=f"no column {column}"):
                shards.log_share(BASKET.tolist(), column)
        for column in (1.5, "1", None):
            with pytest.raises(TypeError, match=f"whole number, 0 … 11; got {column!r}"):
                shards.log_share(BASKET.tolist(), column)


NUMBERS = st.floats(-100, 100)


@given(st.data())
@settings(max_examples=25)
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
        ([[10**400]], {}, ValueError, "not finite"),
        ([[1.0]], {"then": [[-math.inf]]}, ValueError, "not finite"),
        ([[1.0]], {"by": "cell"}, ValueError, "by is 'column' or 'row', got 'cell'"),
        ([[1.0]], {"by": "row", "then": [[1.0]]}, ValueError, "by row"),
        ([[1.0]], {"then": [[1.0], [2.0]]}, ValueError, "got 2 rows"),
    ],
)
def test_refusals(tmp_path, table, options, error, message):
    with pytest.raises(error, match=message):
        TableShards(tmp_path, table, 4, **options)


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.inf], [1.0, 10**400]])
def test_weights_that_fit_no_table_are_refused(tmp_path, weights):
    with TableShards(tmp_path, [[1.0], [2.0]], 1) as shards, pytest.raises(ValueError, match="2 finite numbers"):
        shards.totals(weights)


def test_without_a_second_table_nothing_is_chained(tmp_path):
    with TableShards(tmp_path, [[1.0]], 1) as shards, pytest.raises(ValueError, match="no second table"):
        shards.chained([1.0])


LARGE = 1e308


@pytest.mark.parametrize(
    ("table", "options", "weights"),
    [
        ([[LARGE, 1.0]], {}, [10.0]),
        ([[LARGE, 1.0], [-LARGE, 1.0]], {}, [10.0, 10.0]),  # inf - inf, which is NULL in SQLite
        ([[LARGE, 1.0], [-LARGE, 1.0]], {"by": "row"}, [10.0, 10.0]),
        ([[LARGE, 1.0], [LARGE, 1.0]], {"by": "row"}, [1.0, 1.0]),  # each part is finite, and their sum is not
    ],
)
def test_a_total_beyond_all_floats_is_refused(tmp_path, table, options, weights):
    with TableShards(tmp_path, table, 2, **options) as shards:
        with pytest.raises(TotalOverflows, match="make the weights or the values smaller"):
            shards.totals(weights)
        if not options:
            with pytest.raises(TotalOverflows):
                shards.log_share(weights, 1)
        expected = (0.5 * torch.tensor(table, dtype=torch.float64)).sum(0)
        assert shards.totals([0.5] * len(table)) == expected.tolist()


@pytest.mark.parametrize(
    ("then", "weight"), [([[0.0], [1.0]], 10.0), ([[10.0], [1.0]], 1.0), ([[LARGE], [LARGE]], 1.0)]
)
def test_a_chained_total_beyond_all_floats_is_refused(tmp_path, then, weight):
    table = [[LARGE, 1.0]] if then[0][0] < LARGE else [[1.0, 1.0]]
    with TableShards(tmp_path, table, 2, then=then) as shards, pytest.raises(TotalOverflows):
        shards.chained([weight])


def test_large_ints_are_numbers_like_others(tmp_path):
    with TableShards(tmp_path, [[2**63, 10**30], [-(2**64), 1]], 2) as shards:
        assert shards.totals([2**70, 0]) == [2.0**133, 1e30 * 2.0**70]


def test_a_table_in_the_folder_of_another_leaves_nothing_of_it(tmp_path):
    first = TableShards(tmp_path, TABLE.tolist(), 4, then=NEXT.tolist())
    with TableShards(tmp_path, [[1.0, 2.0]], 2) as shards:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["part-0.sqlite", "part-1.sqlite"]
        assert shards.totals([1.0]) == [1.0, 2.0]
        shards.check_invariants()
        assert first.totals(BASKET.tolist()) == pytest.approx((BASKET @ TABLE).tolist(), rel=1e-12)
    first.close()


def test_closed_shards_say_so(tmp_path):
    with TableShards(tmp_path, [[1.0]], 1, then=[[1.0]]) as shards:
        shards.close()
    asks = (lambda: shards.totals([1.0]), lambda: shards.chained([1.0]), lambda: shards.log_share([1.0], 0))
    for ask in (*asks, shards.check_invariants):
        with pytest.raises(ValueError, match="have been closed"):
            ask()
