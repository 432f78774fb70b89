"""Shards against one SQLite table that is not sharded, and resharding by processes that die before every statement."""

import itertools
import multiprocessing
import os
import shutil
import sqlite3
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.resharding import moves
from minilib.classic.sqlite_shards import OtherLayout, ReshardUnfinished, SqliteShards
from minilib.mechanisms.sharding import ConsistentHashPartitioner, HashPartitioner, RangePartitioner, UnusableKey

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
KEYS = INT64 | st.integers(0, 9) | TEXT | st.binary(max_size=3)
# halves add up without rounding, and digits in a text would count as a number
VALUES = (
    st.none() | st.integers(-9, 9) | st.integers(-9, 9).map(lambda n: n / 2) | st.text("abé") | st.binary(max_size=2)
)
ROWS = st.lists(st.tuples(KEYS, VALUES), max_size=30)
LAYOUTS = [
    HashPartitioner(1),
    HashPartitioner(3),
    HashPartitioner(4),
    ConsistentHashPartitioner((0, 2, 5), 4),
    ConsistentHashPartitioner((2, 5, 7), 4),
]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Only a power cut would tell the difference."""

    def connect(*args, open_file=sqlite3.connect, **options):
        file = open_file(*args, **options)
        file.execute("PRAGMA synchronous = OFF")
        return file

    monkeypatch.setattr(sqlite3, "connect", connect)


@pytest.fixture
def fresh(tmp_path):
    """A new folder at every call."""
    numbers = itertools.count()
    return lambda: tmp_path / f"{next(numbers)}"


def one_table(*puts):
    table = sqlite3.connect(":memory:")
    table.execute("CREATE TABLE rows (key PRIMARY KEY, value) WITHOUT ROWID")
    for rows in puts:
        table.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)
    return table


def content(shards):
    """All rows of all shards, in SQLite's order of keys."""
    rows = [row for part in shards.scatter("SELECT key, value FROM rows").values() for row in part]
    return one_table(rows).execute("SELECT key, value FROM rows ORDER BY key").fetchall()


def test_shards_answer_as_one_table_does(fresh):
    @given(st.sampled_from(LAYOUTS), ROWS, ROWS, st.integers(0, 40))
    @settings(max_examples=60)
    def check(layout, first, second, k):
        table = one_table(first, second)
        with SqliteShards(fresh(), layout) as shards:
            for rows in (first, second):
                shards.put(rows)
                shards.check_invariants()
            ask = partial(table.execute)
            assert content(shards) == ask("SELECT key, value FROM rows ORDER BY key").fetchall()
            assert shards.count() == ask("SELECT count(*) FROM rows").fetchone()[0]
            assert shards.sum() == (ask("SELECT sum(value) FROM rows").fetchone()[0] or 0)
            best = "SELECT key, value FROM rows WHERE value IS NOT NULL ORDER BY value DESC, key LIMIT ?"
            assert shards.top_k(k) == ask(best, (k,)).fetchall()
            for key, value in ask("SELECT key, value FROM rows"):
                assert shards.get(key) == value

    check()


def test_resharding_moves_what_must_move_and_keeps_all(fresh):
    layouts = st.sampled_from(LAYOUTS)

    @given(layouts, layouts, ROWS, st.integers(1, 8))
    @settings(max_examples=60)
    def check(old, new, rows, batch_size):
        folder, table = fresh(), one_table(rows)
        kept = table.execute("SELECT key, value FROM rows ORDER BY key").fetchall()
        with SqliteShards(folder, old) as shards:
            shards.put(rows)
            assert shards.reshard(new, batch_size) == moves(old, new, [key for key, _ in kept]).moved
            shards.check_invariants()
            assert content(shards) == kept
        files = {path.name for path in folder.iterdir()}
        assert files == {"layout.sqlite", *(f"shard-{shard}.sqlite" for shard in new.shards)}
        with SqliteShards(folder, new) as shards:
            shards.check_invariants()
            assert content(shards) == kept
            assert shards.reshard(new, batch_size) == 0

    check()


OLD, NEW, BATCH = ConsistentHashPartitioner((0, 1, 2), 4), ConsistentHashPartitioner((1, 2, 3), 4), 2
USERS = [(f"user:{number}", number) for number in range(12)]


def die_before_every_statement(ready, work):
    """Reshard copies of a folder in processes of which number n is gone before it runs statement n."""
    for number in itertools.count(1):
        folder = shutil.copytree(ready, work / f"{number:04}")
        child = os.fork()
        if child == 0:
            die_before(number)
            SqliteShards(folder, OLD).reshard(NEW, BATCH)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 9:
            return


def die_before(number):
    statements, open_file = itertools.count(1), sqlite3.connect

    def connect(*args, **options):
        file = open_file(*args, **options)
        file.set_trace_callback(lambda statement: next(statements) == number and os._exit(9))
        return file

    sqlite3.connect = connect


@pytest.fixture(scope="module")
def wrecks(tmp_path_factory):
    """Folders whose reshard died before its first, second, ... statement; the last one is finished."""
    ready, work = tmp_path_factory.mktemp("ready") / "table", tmp_path_factory.mktemp("work")
    with SqliteShards(ready, OLD) as shards:
        shards.put(USERS)
    # a process of its own, because a fork of this one would inherit what other tests have started
    child = multiprocessing.get_context("spawn").Process(target=die_before_every_statement, args=(ready, work))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return sorted(work.iterdir())


@pytest.mark.parametrize("target", [NEW, OLD, HashPartitioner(2)], ids=["go on", "go back", "change one's mind"])
def test_whoever_is_killed_loses_no_row(wrecks, target, fresh):
    assert len(wrecks) > 30
    unfinished = doubled = 0
    for wreck in wrecks[:-1]:
        folder = shutil.copytree(wreck, fresh())
        try:
            shards = SqliteShards(folder, OLD)
        except OtherLayout:  # died after the last commit of the reshard
            shards = SqliteShards(folder, NEW)
        with shards:
            shards.check_invariants()
            on_shards = rows_on_disk(folder)
            assert set(on_shards) == set(USERS), "a row is gone"
            try:
                shards.count()
            except ReshardUnfinished:
                unfinished += 1
            doubled += len(on_shards) > len(USERS)
            shards.reshard(target, BATCH)
        with SqliteShards(folder, target) as shards:
            shards.check_invariants()
            assert content(shards) == sorted(USERS)
        assert len(rows_on_disk(folder)) == len(USERS)
    assert unfinished > doubled > 0, "no process died where it hurts"


def rows_on_disk(folder):
    files = [sqlite3.connect(path) for path in folder.glob("shard-*.sqlite")]
    has_rows = "SELECT 1 FROM sqlite_master WHERE name = 'rows'"  # the file may be as far as it got
    rows = [r for file in files if file.execute(has_rows).fetchone() for r in file.execute("SELECT * FROM rows")]
    for file in files:
        file.close()
    return rows


def test_a_resumed_reshard_moves_only_the_rest(fresh, monkeypatch):
    folder, moved = fresh(), moves(OLD, NEW, [key for key, _ in USERS]).moved
    with SqliteShards(folder, OLD) as shards:
        shards.put(USERS)
        move, batches = SqliteShards._move, itertools.count()

        def fail_at_the_third(self, source, destination, keys):
            if next(batches) == 2:
                raise OSError("disk full")
            move(self, source, destination, keys)

        monkeypatch.setattr(SqliteShards, "_move", fail_at_the_third)
        with pytest.raises(OSError):
            shards.reshard(NEW, 1)
        for refused in (shards.count, lambda: shards.get("user:0"), lambda: shards.put([("user:0", 1)])):
            with pytest.raises(ReshardUnfinished, match=r"call reshard\(ConsistentHash.*\(1, 2, 3\), virtual_nodes=4"):
                refused()
        shards.check_invariants()
        assert shards.reshard(NEW, 1) == moved - 2
        assert content(shards) == sorted(USERS)


def test_a_key_asks_one_shard_and_a_scatter_all(fresh):
    with SqliteShards(fresh(), RangePartitioner((10, 20))) as shards:
        shards.put([(5, "a"), (6, "b"), (25, "c")])
        assert shards.asked == {0: 1, 2: 1}
        assert shards.get(25) == "c"
        assert shards.asked == {0: 1, 2: 2}
        assert shards.count() == 3
        assert shards.asked == {0: 2, 1: 1, 2: 3}
        with pytest.raises(KeyError, match="no row has the key 12; shard 1 would own it"):
            shards.get(12)
        assert shards.scatter("SELECT key FROM rows WHERE value > ?", ("a",)) == {0: [(6,)], 1: [], 2: [(25,)]}
        assert shards.top_k(0) == []
        with pytest.raises(ValueError, match="k must be 0 or more, got -1"):
            shards.top_k(-1)


def test_another_layout_is_refused(fresh):
    folder = fresh()
    SqliteShards(folder, HashPartitioner(2)).close()
    said = r"laid out by HashPartitioner\(num_shards=2\), not by HashPartitioner\(num_shards=3\)"
    with pytest.raises(OtherLayout, match=said):
        SqliteShards(folder, HashPartitioner(3))
    SqliteShards(folder, HashPartitioner(2)).close()


def test_keys_that_cannot_be_placed_change_nothing(fresh):
    with SqliteShards(fresh(), RangePartitioner((10,))) as shards:
        shards.put([(5, "a"), (15, "b")])
        with pytest.raises(UnusableKey):
            shards.put([(6, "c"), ("six", "d")])
        assert shards.count() == 2
        with pytest.raises(UnusableKey):
            shards.reshard(RangePartitioner(("m",)))
        assert shards.reshard(RangePartitioner((10,))) == 0
        assert content(shards) == [(5, "a"), (15, "b")]
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            shards.reshard(HashPartitioner(2), 0)
        with pytest.raises(OverflowError):
            shards.put([(2**63, "too large")])
        shards.check_invariants()
        assert shards.count() == 2


def test_invariants_see_a_row_where_it_does_not_belong(fresh):
    def damaged(statement, message):
        with SqliteShards(fresh(), RangePartitioner((10,))) as shards:
            shards.put([(5, "a"), (15, "b")])
            with shards._file(0) as file:
                file.execute(statement)
            with pytest.raises(AssertionError, match=message):
                shards.check_invariants()

    damaged("INSERT INTO rows VALUES (12, 'c')", "shard 0 has 12")
    damaged("INSERT INTO rows VALUES (15, 'b')", "shard 0 has 15")
    with SqliteShards(fresh(), RangePartitioner((10,))) as shards:
        shards.put([(5, "a"), (15, "b")])
        shards._write_layout(shards.partitioner, HashPartitioner(2))
        shards._insert(0, [(15, "b")])
        shards.check_invariants()
        shards._insert(0, [(15, "stale")])
        with pytest.raises(AssertionError, match="15 is on two shards with two values"):
            shards.check_invariants()
