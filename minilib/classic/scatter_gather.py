"""Scatter-gather: one query to all shards of a table of numbers, on SQLite files; the answers merged.

    by column   every shard has all rows of some columns, and answers those; the answers are concatenated
    by row      every shard has some rows of all columns, and answers a part of every sum; the answers are added

    one round    totals       Σ weight · value of every column
                 chained      totals of a second table, whose weights are the first one's totals, cut at 0: the first
                              by column and the second by row on the same shards, so that no total leaves its shard
    two rounds   log_share    of one column's total among all: first the largest total, then a sum that needs it

The rows are, say, products, the columns shops, the values prices and the weights a basket.

Source: Barroso, Dean and Hölzle, "Web Search for a Planet", IEEE Micro 2003 (a query goes to all shards of an index,
and their answers are merged); partial aggregates are those of any distributed database.
"""

from __future__ import annotations

import math
import operator
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minilib.mechanisms.sharding.columns import column_ranges, num_copies
from minilib.mechanisms.sharding.slicing import slices

NUMBER_BYTES = 8
TOO_LARGE = "a total is beyond the largest float; make the weights or the values smaller"
Rows = Sequence[Sequence[float]]


class PartialAnswers(ValueError):
    """A question that shards cannot answer from sums of some rows only."""


class TotalOverflows(ValueError):
    """A total, or a part of it, is beyond the largest float."""


@dataclass
class QueryTraffic:
    """What asking has taken so far.

    Args:
        queries: one for each shard and round.
        rounds: how often all shards were asked, each time after the answers of the time before.
        answer_bytes: of the numbers that shards have sent back.
    """

    queries: int = 0
    rounds: int = 0
    answer_bytes: int = 0


class TableShards:
    """A table of numbers on shards; made anew, and then only asked.

    Args:
        folder: of the files, one a shard; made if it does not exist. Those of an earlier table are deleted.
        table: rows of equal length, of finite numbers.
        num_shards: shards. By row the last ones have fewer rows, or none; by column all have as many columns, or, if
            there are fewer columns than shards, a copy of one column.
        by: "column" or "row".
        then: a second table, with a row for each column of the first; cut by row, on the same shards. By column only.

    Attributes:
        traffic: what asking has taken.

    Raises:
        DoesNotDivide: if columns cannot be dealt to shards.
        ValueError: for a table without a number, with rows of unlike length or numbers that are not finite, or another
            `by`.
    """

    def __init__(
        self, folder: Path, table: Rows, num_shards: int, by: str = "column", then: Rows | None = None
    ) -> None:
        table = _floats_of(table, "table")
        self.num_rows, self.num_columns, self.by = len(table), len(table[0]), by
        if by == "column":
            parts = column_ranges(self.num_columns, num_shards, copies=True)
        elif by == "row":
            parts = [range(*(min(end, self.num_rows) for end in part)) for part in slices(self.num_rows, num_shards)]
        else:
            raise ValueError(f"by is 'column' or 'row', got {by!r}")
        if then is not None:
            then = _floats_of(then, "then")
            if by != "column" or len(then) != self.num_columns:
                raise ValueError(
                    f"then needs a first table by column, and a row for each of its {self.num_columns} columns; got "
                    f"{len(then)} rows behind a table by {by}"
                )
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("part-*.sqlite"):
            earlier.unlink()
        self.parts, self.traffic, self._has_next = parts, QueryTraffic(), then is not None
        self._asked = range(0, num_shards, num_copies(parts) if by == "column" else 1)  # of copies only the first
        self._files = [_open(folder / f"part-{number}.sqlite") for number in range(num_shards)]
        for file, part in zip(self._files, parts, strict=True):
            rows, columns = (range(self.num_rows), part) if by == "column" else (part, range(self.num_columns))
            _write(file, "cells", ((row, column, table[row][column]) for row in rows for column in columns))
            if then is not None:
                _write(file, "next_cells", ((row, column, x) for row in part for column, x in enumerate(then[row])))

    def totals(self, weights: Sequence[float]) -> list[float]:
        """Σ over rows of weight · value, for every column. One round.

        Args:
            weights: one a row, finite.

        Raises:
            TotalOverflows: if a total is too large; of some rows, if the cut is by row.
            ValueError: for another number of weights, or one that is not finite; after `close`.
        """
        answers = self._ask("SELECT total FROM totals ORDER BY number", weights=weights)
        if self.by == "column":
            return [total for answer in answers for (total,) in answer]
        return _sums(answer for answer in answers if answer)

    def chained(self, weights: Sequence[float]) -> list[float]:
        """Totals of the second table, its weights the first one's totals, those below 0 taken as 0. One round.

        Raises:
            ValueError: if there is no second table, and as `totals`.
        """
        if not self._has_next:
            raise ValueError("there is no second table to chain; pass one as `then`")
        answers = self._ask(
            "SELECT total(value * max(total, 0)) FROM next_cells JOIN totals ON number = row "
            "GROUP BY column ORDER BY column",
            weights=weights,
        )
        return _sums(answers)

    def log_share(self, weights: Sequence[float], column: int) -> float:
        """log(exp(total of one column) / Σ exp(total of each)). Two rounds of one and two numbers a shard.

        Raises:
            PartialAnswers: by row, where no shard has a whole total.
            IndexError: if there is no such column.
            TypeError: if the column is no whole number.
            ValueError: as `totals`.
        """
        if self.by == "row":
            raise PartialAnswers("by row a shard has sums of some rows, and their maximum is no maximum: cut by column")
        try:
            column = operator.index(column)
        except TypeError:
            raise TypeError(f"a column is a whole number, 0 … {self.num_columns - 1}; got {column!r}") from None
        if not 0 <= column < self.num_columns:
            raise IndexError(f"there is no column {column!r}; columns are 0 … {self.num_columns - 1}")
        largest = max(answer[0][0] for answer in self._ask("SELECT max(total) FROM totals", weights=weights))
        sums = self._ask("SELECT total(exp(total - ?)), total(total * (number = ?)) FROM totals", (largest, column))
        (share,), (own,) = ([math.fsum(answer[0][k] for answer in sums)] for k in range(2))
        return own - largest - math.log(share)

    def close(self) -> None:
        """Close all files; nothing can be asked after that."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> TableShards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_invariants(self) -> None:
        """Every cell is on the shards that have its column, or its row, and on no other."""
        self._check_open()
        for file, part in zip(self._files, self.parts, strict=True):
            found = {number for (number,) in file.execute(f"SELECT DISTINCT {self.by} FROM cells")}
            assert found == set(part), f"a shard has {self.by}s {found}, and should have {part}"

    def _ask(self, sql: str, parameters: tuple = (), weights: Sequence[float] | None = None) -> list[list[tuple]]:
        """One round: every shard answers, from its totals; with weights it computes these first, and keeps them."""
        self._check_open()
        if weights is not None:
            floats = _finite_floats(weights)
            if floats is None or len(floats) != self.num_rows:
                raise ValueError(f"weights are {self.num_rows} finite numbers, one a row; got {weights!r}")

        def answer(number: int) -> list[tuple]:
            file = self._files[number]
            if weights is not None:
                _compute_totals(file, floats)
            return file.execute(sql, parameters).fetchall()

        with ThreadPoolExecutor(len(self._asked)) as threads:
            answers = list(threads.map(answer, self._asked))
        self.traffic.rounds += 1
        self.traffic.queries += len(answers)
        self.traffic.answer_bytes += NUMBER_BYTES * sum(len(row) for rows in answers for row in rows)
        return answers

    def _check_open(self) -> None:
        if not self._files:
            raise ValueError("these shards have been closed; make them anew")


def _sums(answers: Iterable[list[tuple]]) -> list[float]:
    """Of what shards answer, number by number."""
    columns = ([part for (part,) in column] for column in zip(*answers, strict=True))
    try:
        return [math.fsum(_checked(parts)) for parts in columns]
    except OverflowError:  # of finite numbers
        raise TotalOverflows(TOO_LARGE) from None


def _checked(totals: list[float | None]) -> list[float]:
    """Themselves; SQLite has inf for a total that is too large, and NULL for inf - inf."""
    if any(total is None or not math.isfinite(total) for total in totals):
        raise TotalOverflows(TOO_LARGE)
    return totals


def _compute_totals(file: sqlite3.Connection, weights: Sequence[float]) -> None:
    with file:
        file.executemany("INSERT OR REPLACE INTO weights VALUES (?, ?)", enumerate(weights))
        file.execute(
            "INSERT OR REPLACE INTO totals SELECT column, total(value * weight) FROM cells JOIN weights USING (row) "
            "GROUP BY column"
        )
        _checked([total for (total,) in file.execute("SELECT total FROM totals")])


def _open(path: Path) -> sqlite3.Connection:
    file = sqlite3.connect(path, check_same_thread=False)
    file.create_function("exp", 1, math.exp, deterministic=True)  # not every build of SQLite has it
    file.execute("CREATE TEMP TABLE weights (row INTEGER PRIMARY KEY, weight)")
    file.execute("CREATE TEMP TABLE totals (number INTEGER PRIMARY KEY, total)")
    return file


def _write(file: sqlite3.Connection, name: str, cells: Iterable[tuple[int, int, float]]) -> None:
    with file:
        file.execute(f"CREATE TABLE {name} (row, column, value, PRIMARY KEY (column, row)) WITHOUT ROWID")
        file.executemany(f"INSERT INTO {name} VALUES (?, ?, ?)", cells)


def _floats_of(table: Rows, name: str) -> list[list[float]]:
    lengths = {len(row) for row in table}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{name} has rows of one length, 1 or more; got lengths {sorted(lengths)}")
    rows = [_finite_floats(row) for row in table]
    if None in rows:
        raise ValueError(f"{name} has a number that is not finite, which SQLite would store as NULL or add to nothing")
    return rows


def _finite_floats(numbers: Sequence[float]) -> list[float] | None:
    """None if one is not finite; SQLite would take no int beyond 64 bits."""
    try:
        return [float(number) for number in numbers] if all(map(math.isfinite, numbers)) else None
    except OverflowError:  # an int beyond the largest float
        return None
