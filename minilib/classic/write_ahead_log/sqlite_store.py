"""SQLite in its WAL mode, with the few methods of our store: a group is a transaction, a snapshot is a checkpoint.

With synchronous = FULL the log is synced at every commit. With NORMAL it is synced at checkpoints alone: a commit may
be lost with the power, and not with the process; the database stays whole in either case.

Sources: SQLite, "Write-Ahead Logging", 2.1 and "PRAGMA synchronous".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw

SYNCHRONOUS = ("FULL", "NORMAL")
SQLITE_FILE = "store.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (number INTEGER);
INSERT INTO records SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM records);
"""


class SqliteStore:
    """Keys and values in a SQLite file; nobody else may have it open.

    Args:
        folder: where the file is, or is made.
        synchronous: one of SYNCHRONOUS, or "OFF" for whoever only reads.
        vfs: SQLite's way to files; "" for its own.
        page_size: bytes, of a file that is made.

    Raises:
        apsw.Error: if the file is no database, or in use.
    """

    def __init__(self, folder: Path, synchronous: str = "FULL", vfs: str = "", page_size: int = 4096) -> None:
        self._database = apsw.Connection(str(folder / SQLITE_FILE), vfs=vfs or None)
        for pragma in (
            f"page_size = {page_size}",
            "locking_mode = EXCLUSIVE",  # no shared memory beside the log
            "journal_mode = WAL",
            f"synchronous = {synchronous}",
            "wal_autocheckpoint = 0",  # `snapshot` says when
        ):
            self._database.execute(f"PRAGMA {pragma}").fetchall()
        self._database.execute(_TABLES)

    @property
    def num_acknowledged(self) -> int:
        """Records in committed transactions."""
        return self._database.execute("SELECT number FROM records").fetchall()[0][0]

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys with their values."""
        yield from self._database.execute("SELECT key, value FROM pairs")

    def put(self, key: bytes, value: bytes) -> None:
        """Give a key a value with the next `commit`."""
        self._change("INSERT OR REPLACE INTO pairs VALUES (?, ?)", (key, value))

    def delete(self, key: bytes) -> None:
        """Remove a key with the next `commit`."""
        self._change("DELETE FROM pairs WHERE key = ?", (key,))

    def commit(self) -> int:
        """End the transaction; returns `num_acknowledged`."""
        if self._database.in_transaction:
            self._database.execute("COMMIT")
        return self.num_acknowledged

    def snapshot(self) -> None:
        """Commit, move the log into the database, and begin the log anew."""
        self.commit()
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def check_invariants(self) -> None:
        """SQLite finds no fault in the file.

        Raises:
            AssertionError: if it does.
        """
        found = self._database.execute("PRAGMA integrity_check").fetchall()
        assert found == [("ok",)], found

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _change(self, statement: str, values: tuple[bytes, ...]) -> None:
        if not self._database.in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
        self._database.execute(statement, values)
        self._database.execute("UPDATE records SET number = number + 1")
