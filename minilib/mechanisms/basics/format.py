"""Numbers and tables as people read them: SI prefixes, exact units, one table that is HTML in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Write a number with an SI prefix: ``si(1.979e15, "FLOP/s")`` is ``"1.98 PFLOP/s"``; G is 1e9, never 2³⁰.

    Seconds stay seconds above one: a price in kiloseconds helps nobody, so minutes, hours and days are used. Dollars
    stay dollars below one: "340 m$" reads as millions.

    Args:
        value: the number in base units; None, for something that was not measured, is written "–".
        unit: base unit, such as "s", "B", "B/s", "FLOP/s".
        digits: significant digits.
    """
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    if unit == "s" and abs(value) >= 120:
        return _long_time(value, digits)
    rounded = float(f"{value:.{digits}g}")
    exponent = min(18, max(-9, 3 * math.floor(math.log10(abs(rounded)) / 3)))
    if unit == "s":
        exponent = min(exponent, 0)
    if unit.startswith("$"):
        exponent = max(exponent, 0)
    scaled = rounded / 10.0**exponent
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{decimals}f} {_PREFIXES[exponent]}{unit}".strip()


def gib(value: float) -> str:
    """Write a byte count in binary gibibytes: 2³⁰ bytes are "1.0 GiB"."""
    return f"{value / 2**30:,.1f} GiB"


def _long_time(seconds: float, digits: int) -> str:
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= 2 * size:
            amount = seconds / size
            decimals = max(0, digits - 1 - math.floor(math.log10(abs(amount))))
            return f"{amount:,.{decimals}f} {unit}"
    raise AssertionError("callers pass at least 120 s")


@dataclass(frozen=True)
class Table:
    """Rows under column names: plain text in a terminal, an HTML table in a notebook.

    Args:
        columns: the column names.
        rows: one sequence of cells per row, as long as `columns`; cells are written with `str`.

    Raises:
        ValueError: if a row is shorter or longer than the columns.
    """

    columns: Sequence[str]
    rows: Iterable[Sequence[object]]

    def __post_init__(self) -> None:
        rows = [tuple(str(cell) for cell in row) for row in self.rows]
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(f"expected {len(self.columns)} cells {tuple(self.columns)}, got {len(row)}: {row}")
        object.__setattr__(self, "rows", rows)

    def __str__(self) -> str:
        lines = [tuple(self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        lines.insert(1, tuple("─" * width for width in widths))
        sides = self._sides()
        text = (
            "  ".join(
                cell.rjust(width) if side == "right" else cell.ljust(width)
                for cell, width, side in zip(line, widths, sides, strict=True)
            )
            for line in lines
        )
        return "\n".join(line.rstrip() for line in text)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sides = self._sides()

        def row(tag: str, cells: Sequence[str]) -> str:
            return "".join(
                f"<{tag} style='text-align:{side}'>{html.escape(cell)}</{tag}>"
                for cell, side in zip(cells, sides, strict=True)
            )

        body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in self.rows)
        return f"<table><thead><tr>{row('th', self.columns)}</tr></thead><tbody>{body}</tbody></table>"

    def _sides(self) -> list[str]:
        """Numbers go right, words left; a column is numbers if every cell that is not a dash begins as one."""
        sides = []
        for column in range(len(self.columns)):
            cells = [row[column] for row in self.rows if row[column] not in ("", "–")]
            numbers = cells and all(cell.lstrip("-−~$").startswith(tuple("0123456789")) for cell in cells)
            sides.append("right" if numbers else "left")
        return sides
