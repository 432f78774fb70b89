import math

import pytest

from minilib.mechanisms.basics.format import Table, gib, si


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (1.979e15, "FLOP/s", "1.98 PFLOP/s"),
        (999.96e9, "B/s", "1.00 TB/s"),  # rounding crosses a prefix
        (80e9, "B", "80.0 GB"),  # decimal: 80 GB is not 80 GiB
        (3.3e-9, "s", "3.30 ns"),
        (3e-10, "s", "0.300 ns"),  # below the smallest prefix
        (119.0, "s", "119 s"),
        (7200, "s", "2.00 h"),
        (400 * 86400, "s", "400 days"),
        (0, "s", "0 s"),
        (math.inf, "s", "inf s"),
        (None, "s", "–"),
        (-2.5e6, "", "-2.50 M"),
        (0.34, "$/h", "0.340 $/h"),  # not 340 m$/h, which reads as millions
        (7.2e6, "$", "7.20 M$"),
    ],
)
def test_si(value, unit, expected):
    assert si(value, unit) == expected


def test_gib_is_binary():
    assert gib(2**30) == "1.0 GiB"
    assert gib(80e9) == "74.5 GiB"


def test_table_shows_the_same_cells_as_text_and_as_html():
    table = Table(("name", "seconds"), [("copy", "1.0"), ("a < b", 22), ("no", "–")])
    assert str(table).splitlines() == [
        "name   seconds",
        "─────  ───────",
        "copy       1.0",
        "a < b       22",
        "no           –",
    ]
    assert "a &lt; b" in table._repr_html_()
    assert "<th style='text-align:right'>seconds</th>" in table._repr_html_()


def test_table_refuses_a_row_of_the_wrong_length():
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table(("a", "b"), [("only one",)])
