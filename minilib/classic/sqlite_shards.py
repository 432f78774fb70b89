"""A table of keys and values on shards that are real: one SQLite file each, and a partitioner that says which.

A row that is asked for by its key costs one shard a question. Anything else is scattered to all of them and the answers
are merged. To reshard, a row is committed on its new shard before it is deleted on its old one: whoever is killed in
between leaves it on both, alike, and never on none.

Sources: SQLite, "Atomic Commit In SQLite"; the merge of partial aggregates is that of any distributed database.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minilib.mechanisms.sharding import Key, Partitioner

Value = int | float | str | bytes | None


class OtherLayout(ValueError):
    """The folder was laid out by another partitioner."""


class ReshardUnfinished(RuntimeError):
    """Rows are on their way between two layouts, some perhaps on two shards; until `reshard` ends, nothing else may."""


class SqliteShards:
    """Rows on shards. Only one process at a time may write, and there is no transaction across shards.

    Args:
        folder: made if it does not exist; layout.sqlite remembers the partitioner, shard-<number>.sqlite has rows.
        partitioner: the one that the folder was laid out by; its repr must say all that it decides by.

    Attributes:
        asked: shard → how many requests went to it so far.

    Raises:
        OtherLayout: if the folder was laid out by another one.
    """

    def __init__(self, folder: Path, partitioner: Partitioner) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.partitioner = folder, partitioner
        self.asked: Counter[int] = Counter()
        self._files: dict[int, sqlite3.Connection] = {}
        self._layout = sqlite3.connect(folder / "layout.sqlite")
        laid_out_by, self._target = self._read_layout()
        if laid_out_by != repr(partitioner):
            self.close()
            raise OtherLayout(
                f"{folder.name} is laid out by {laid_out_by}, not by {partitioner!r}; open it with that, then reshard"
            )

    def put(self, rows: Iterable[tuple[Key, Value]]) -> None:
        """Write rows, in place of those with the same keys. Each shard commits its part by itself.

        Raises:
            UnusableKey: if the partitioner cannot place a key; nothing was written.
            OverflowError: if an integer has more than the 64 bits that SQLite stores; its shard wrote nothing.
            ReshardUnfinished: if the last reshard was interrupted.
        """
        self._must_be_settled()
        parts: dict[int, list[tuple[Key, Value]]] = defaultdict(list)
        for key, value in rows:
            parts[self.partitioner.owner(key)].append((key, value))
        for shard, part in parts.items():
            self.asked[shard] += 1
            self._insert(shard, part)

    def get(self, key: Key) -> Value:
        """The value of a key; asks one shard.

        Raises:
            KeyError: if there is no such row.
            ReshardUnfinished: if the last reshard was interrupted.
        """
        self._must_be_settled()
        shard = self.partitioner.owner(key)
        self.asked[shard] += 1
        row = self._file(shard).execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(f"no row has the key {key!r}; shard {shard} would own it")
        return row[0]

    def scatter(self, sql: str, parameters: Sequence[Value] = ()) -> dict[int, list[tuple]]:
        """Ask every shard the same, all at once.

        Args:
            sql: a query over the table rows (key, value).
            parameters: for its question marks.

        Returns:
            Shard → its rows; merging them is up to the caller.

        Raises:
            ReshardUnfinished: if the last reshard was interrupted.
        """
        self._must_be_settled()
        shards = self.partitioner.shards
        files = [self._file(shard) for shard in shards]
        self.asked.update(shards)
        with ThreadPoolExecutor(len(files)) as threads:
            answers = threads.map(lambda file: file.execute(sql, parameters).fetchall(), files)
            return dict(zip(shards, answers, strict=True))

    def count(self) -> int:
        """Rows on all shards: the sum of their counts."""
        return sum(rows[0][0] for rows in self.scatter("SELECT count(*) FROM rows").values())

    def sum(self) -> int | float:
        """Sum of all values that are not NULL: the sum of the shards' sums, 0 if there are none.

        Integers are exact; floats are added in another order than in one file, so their last bits may differ.
        """
        sums = [rows[0][0] for rows in self.scatter("SELECT sum(value) FROM rows").values()]
        return sum(part for part in sums if part is not None)

    def top_k(self, k: int) -> list[tuple[Key, Value]]:
        """The k rows with the largest values, equal ones in the order of their keys; fewer if there are fewer.

        The best k of all are among the best k of each, so every shard sends k rows and no more.

        Raises:
            ValueError: if k is below 0.
        """
        if k < 0:
            raise ValueError(f"k must be 0 or more, got {k!r}")
        best = "SELECT key, value FROM rows WHERE value IS NOT NULL ORDER BY value DESC, key LIMIT ?"
        rows = [row for part in self.scatter(best, (k,)).values() for row in part]
        rows.sort(key=lambda row: _order(row[0]))
        rows.sort(key=lambda row: _order(row[1]), reverse=True)  # stable: equal values stay in the order of their keys
        return rows[:k]

    def reshard(self, target: Partitioner, batch_size: int = 1000) -> int:
        """Lay the rows out by another partitioner.

        If it is interrupted, open the folder by the old partitioner and call this again: with the same target to go
        on, with the old partitioner to go back.

        Args:
            target: the new partitioner.
            batch_size: rows a transaction.

        Returns:
            Rows that this call moved: those that were not where `target` wants them, and no others.

        Raises:
            UnusableKey: if the target cannot place a key; call it again with the old partitioner.
            ValueError: if batch_size is below 1.

        Cost: every key read once; each moved row read, written and deleted once, with two commits a batch. Memory for
        the keys that leave one shard.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        self._write_layout(self.partitioner, target)
        moved = sum(self._move_from(shard, target, batch_size) for shard in self._on_disk())
        for shard in set(self._on_disk()) - set(target.shards):
            self._file(shard).close()
            del self._files[shard]
            self._path(shard).unlink()
        self._write_layout(target, None)
        self.partitioner = target
        return moved

    def close(self) -> None:
        """Close all files."""
        for file in (self._layout, *self._files.values()):
            file.close()

    def __enter__(self) -> SqliteShards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_invariants(self) -> None:
        """Every row is on the shard that owns it, and so on no other; while a reshard is unfinished, copies agree."""
        seen: dict[Key, Value] = {}
        for shard in self._on_disk():
            for key, value in self._file(shard).execute("SELECT key, value FROM rows"):
                if self._target is None:
                    assert self.partitioner.owner(key) == shard, f"shard {shard} has {key!r}, which it does not own"
                assert seen.setdefault(key, value) == value, f"{key!r} is on two shards with two values"

    def _move_from(self, source: int, target: Partitioner, batch_size: int) -> int:
        """Move what one shard has and should not have; returns how many rows."""
        leaving: dict[int, list[Key]] = defaultdict(list)
        for (key,) in self._file(source).execute("SELECT key FROM rows"):
            if target.owner(key) != source:
                leaving[target.owner(key)].append(key)
        for shard, keys in leaving.items():
            for start in range(0, len(keys), batch_size):
                self._move(source, shard, keys[start : start + batch_size])
        return sum(map(len, leaving.values()))

    def _move(self, source: int, destination: int, keys: list[Key]) -> None:
        file = self._file(source)
        rows = [file.execute("SELECT key, value FROM rows WHERE key = ?", (key,)).fetchone() for key in keys]
        self._insert(destination, rows)  # committed before the next line: killed here, the rows are on both shards
        with file:
            file.executemany("DELETE FROM rows WHERE key = ?", [(key,) for key in keys])

    def _insert(self, shard: int, rows: list[tuple[Key, Value]]) -> None:
        with self._file(shard) as file:  # commits, or rolls back if it fails
            file.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.sqlite"

    def _on_disk(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("shard-")) for path in self.folder.glob("shard-*.sqlite"))

    def _file(self, shard: int) -> sqlite3.Connection:
        """The connection to a shard; opened, and the file made, when it is first wanted."""
        if shard not in self._files:
            # scatter hands a connection to another thread, but never to two at a time
            file = self._files[shard] = sqlite3.connect(self._path(shard), check_same_thread=False)
            # columns without a type keep what they are given: 1, '1' and x'31' are three keys
            file.execute("CREATE TABLE IF NOT EXISTS rows (key PRIMARY KEY, value) WITHOUT ROWID")
        return self._files[shard]

    def _must_be_settled(self) -> None:
        if self._target is not None:
            raise ReshardUnfinished(f"a reshard was interrupted; call reshard({self._target}) to finish it first")

    def _read_layout(self) -> tuple[str, str | None]:
        """Partitioner in force and the one being moved to; a new folder begins with ours."""
        with self._layout as layout:
            layout.execute("CREATE TABLE IF NOT EXISTS layout (id INTEGER PRIMARY KEY, partitioner, target)")
            layout.execute("INSERT OR IGNORE INTO layout VALUES (0, ?, NULL)", (repr(self.partitioner),))
        return layout.execute("SELECT partitioner, target FROM layout").fetchone()

    def _write_layout(self, partitioner: Partitioner, target: Partitioner | None) -> None:
        self._target = None if target is None else repr(target)
        with self._layout as layout:
            layout.execute("UPDATE layout SET partitioner = ?, target = ?", (repr(partitioner), self._target))


def _order(value: Value) -> tuple[int, Value]:
    """Sorts as SQLite does: numbers before text before blobs."""
    return (0 if isinstance(value, int | float) else 1 if isinstance(value, str) else 2), value
