"""Rows are durable when they are acknowledged, in whole groups, with as many fsyncs as counted."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from minilib.classic.commit_server import FILE_NAME, GROUPINGS
from minilib.classic.group_commit import CommitServerGone, CommitTimeout, GroupCommit, run_writers

WRITERS = 8


def rows_of(folder):
    """What a reader finds, as (value, number of the commit, its size); checks that every group is whole."""
    file = sqlite3.connect(folder / FILE_NAME)
    try:
        rows = file.execute("SELECT value, number, size FROM rows").fetchall()
    finally:
        file.close()
    counts = Counter(number for _, number, _ in rows)
    assert all(counts[number] == size for _, number, size in rows), "half a group"
    return rows


def round_of(server, first):
    """A row of every writer, sent while the server stands still as it does in an fsync; their acknowledgements."""
    server.stop()
    for writer in range(server.num_writers):
        server.send(writer, first + writer)
    server.resume()
    return [server.receive(writer) for writer in range(server.num_writers)]


@pytest.mark.parametrize("grouping, commits", [("one", WRITERS), ("window", 1), ("group", 1)])
def test_rows_that_are_there_together_share_a_commit_and_its_fsync(tmp_path, grouping, commits):
    with GroupCommit(tmp_path, WRITERS, grouping, window=20 if grouping == "window" else 0) as server:
        for number in range(3):
            before = number * commits
            acks = round_of(server, 100 * number)
            assert [ack.value for ack in acks] == [100 * number + writer for writer in range(WRITERS)]
            assert {ack.number for ack in acks} == set(range(before + 1, before + commits + 1))
            assert {ack.size for ack in acks} == {WRITERS // commits}
            assert all(ack.log_syncs == ack.number for ack in acks), "one fsync a commit, and acknowledged behind it"
            assert {ack.database_syncs for ack in acks} == {0}
    assert sorted(value for value, _, _ in rows_of(tmp_path)) == [n * 100 + w for n in range(3) for w in range(WRITERS)]


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("writers, rows_each", [(1, 5), (4, 25), (16, 0), (3, 1)])
def test_what_is_counted_adds_up(tmp_path, grouping, writers, rows_each):
    with GroupCommit(tmp_path, writers, grouping, window=0.002 if grouping == "window" else 0) as server:
        written = run_writers(server, rows_each)
    rows = rows_of(tmp_path)
    assert sorted(value for value, _, _ in rows) == list(range(writers * rows_each))
    assert written.rows == len(rows) == len(written.waits)
    assert written.commits == len({number for _, number, _ in rows}) == written.log_syncs
    assert all(wait >= 1 for wait in written.waits)
    if grouping == "one":
        assert written.commits == len(rows)
    else:
        assert rows_each <= written.commits <= len(rows)
    # commits that had ended when a row was sent and whose acknowledgements nobody had read yet are at most one for each
    # other writer; then comes the commit that runs, and with "one" those of the rows that were there before
    assert max(written.waits, default=0) <= (2 * writers - 1 if grouping == "one" else writers + 1)


def test_a_window_ends_when_every_writer_is_there_and_otherwise_by_the_clock(tmp_path):
    with GroupCommit(tmp_path, 2, "window", window=3600) as server:
        server.send(0, 1)
        with pytest.raises(CommitTimeout, match="writer 0 within 0.3 s"):
            server.receive(0, timeout=0.3)
        with pytest.raises(CommitTimeout, match="any writer"):
            server.ready(timeout=0.01)
        server.send(1, 2)
        assert server.receive(0).size == server.receive(1).size == 2
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with GroupCommit(tmp_path, 2, "window", window=0.01) as server:
        server.send(0, 1)
        assert server.receive(0).size == 1


def test_a_window_that_waits_for_nobody_else_costs_its_only_writer_the_whole_window(tmp_path):
    """A single writer is everybody: no window passes."""
    with GroupCommit(tmp_path, 1, "window", window=3600) as server:
        assert run_writers(server, 3).commits == 3


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_after_a_kill_every_acknowledged_row_is_there_and_no_half_group(tmp_path, grouping):
    """Killed at eight different times in a row, each time going on with the same file."""
    acknowledged, sent = set(), set()
    for attempt in range(8):
        server = GroupCommit(tmp_path, WRITERS, grouping, window=0.001 if grouping == "window" else 0)
        with server:
            try:
                for turn in range(50):
                    first = 10_000 * attempt + 100 * turn
                    for writer in range(WRITERS):
                        server.send(writer, first + writer)
                        sent.add(first + writer)
                    if turn == 1 + attempt * 3:
                        time.sleep(0.0005 * attempt)  # where it is hit does not matter: all must hold anywhere
                        server.kill()
                    for writer in range(WRITERS):
                        acknowledged.add(server.receive(writer).value)
            except CommitServerGone:
                pass
            else:
                pytest.fail("the server was killed and went on")
        values = [value for value, _, _ in rows_of(tmp_path)]
        assert len(values) == len(set(values))
        assert acknowledged <= set(values) <= sent
    assert len(acknowledged) > 8 * WRITERS


@pytest.mark.skipif(not shutil.which("strace"), reason="counts by strace what the kernel is asked for")
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_kernel_is_asked_as_often_as_counted(tmp_path, grouping):
    with GroupCommit(tmp_path, WRITERS, grouping, window=0.01 if grouping == "window" else 0) as server:
        round_of(server, 0)
        report = tmp_path / "calls"
        tracer = subprocess.Popen(
            ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(report), "-p", str(server.pid)],
            stderr=subprocess.PIPE,
        )
        try:
            line = tracer.stderr.readline().decode()
            if "attached" not in line:
                pytest.skip(f"strace may not look: {line.strip()}")
            before = server_syncs = None
            for number in range(1, 6):
                acks = round_of(server, 100 * number)
                server_syncs = max(ack.log_syncs for ack in acks)
                before = min(ack.log_syncs for ack in acks) - 1 if before is None else before
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(30)
            tracer.stderr.close()
    calls = [call for call in report.read_text().splitlines() if re.search(r"f(data)?sync\(.*-wal>", call)]
    assert len(calls) == server_syncs - before > 0


def test_when_the_log_moves_into_the_file_the_file_is_confirmed_too(tmp_path):
    with GroupCommit(tmp_path, 1, "one") as server:
        written = run_writers(server, 1100)  # SQLite moves the log at 1,000 pages
    assert written.commits == 1100
    assert written.database_syncs >= 1 and written.log_syncs >= 1100


def test_a_file_that_exists_goes_on_with_its_numbers(tmp_path):
    for number in range(3):
        with GroupCommit(tmp_path, 2, "one") as server:
            assert {ack.number for ack in round_of(server, number)} == {2 * number + 1, 2 * number + 2}


BAD = {
    "grouping": ({"grouping": "all"}, "one, window, group; got 'all'"),
    "no writer": ({"num_writers": 0}, "at least 1, got 0"),
    "a window below 0": ({"grouping": "window", "window": -1}, "window is a time"),
    "a window without an end": ({"grouping": "window", "window": float("nan")}, "window is a time"),
    "a window of another grouping": ({"window": 1}, "for the grouping 'window' alone"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(tmp_path, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        GroupCommit(**{"folder": tmp_path, "num_writers": 2, **options})


def test_bad_rows_and_folders_are_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="make it first"):
        GroupCommit(tmp_path / "none", 1)
    with GroupCommit(tmp_path, 1) as server:
        for value in (1 << 63, 1.5, "row", None):
            with pytest.raises(ValueError, match="64 bits"):
                server.send(0, value)
        server.send(0, -(1 << 63))
        assert server.receive(0).value == -(1 << 63)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"no database, but long enough to look at" * 100)
    with GroupCommit(tmp_path, 1) as server, pytest.raises(CommitServerGone, match="not a database|NotADB"):
        server.send(0, 1)
        server.receive(0)


def children():
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("state", ["idle", "stopped", "killed", "busy"])
def test_no_process_is_left_behind(tmp_path, state):
    before = len(children())
    with pytest.raises(KeyboardInterrupt), GroupCommit(tmp_path, 2, "group") as server:
        if state == "stopped":
            server.stop()
        if state == "killed":
            server.kill()
        if state == "busy":
            for number in range(200):
                server.send(number % 2, number)
        raise KeyboardInterrupt
    assert len(children()) == before
    assert not psutil.pid_exists(server.pid)


def test_the_process_ends_with_its_parent(tmp_path):
    """Killed without a chance to close anything."""
    code = (
        "import sys, time; from pathlib import Path; from minilib.classic.group_commit import GroupCommit;"
        "server = GroupCommit(Path(sys.argv[1]), 2); print(server.pid, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    psutil.Process(pid).kill()
    pytest.fail("the process that commits outlived its parent")


def test_nothing_but_the_file_and_its_log_is_written(tmp_path):
    with GroupCommit(tmp_path, 1) as server:
        run_writers(server, 2)
    assert {path.name for path in Path(tmp_path).iterdir()} == {FILE_NAME}, "at its end the log is in the file"
