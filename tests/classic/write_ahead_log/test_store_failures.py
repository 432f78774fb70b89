"""A full disk costs what was asked for and nothing else; after a failed fsync nothing is acknowledged any more."""

import errno
import os
import subprocess
import sys

import pytest

from minilib.classic.write_ahead_log.crashes.power_cuts import SNAP, crash_everywhere, record_run
from minilib.classic.write_ahead_log.crashes.rules import SMALL_RUN
from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk
from minilib.classic.write_ahead_log.disks.real_disk import RealDisk
from minilib.classic.write_ahead_log.restart import LOG
from minilib.classic.write_ahead_log.store import DurableStore, NoSpaceLeft, StoreFailed
from minilib.mechanisms.basics.child import child_environment
from minilib.mechanisms.journaling import TEMPORARY, SyncFailed, numbered
from tests.classic.write_ahead_log.cases import continued


def tried(disk, changes):
    """A store that goes on after each full disk; returns the store, its values and how often the disk was full."""
    store, full = DurableStore(disk), 0
    values, pending = {}, {}
    for change in changes:
        before = store.num_acknowledged
        try:
            if isinstance(change, tuple):
                store.delete(change[0]) if change[1] is None else store.put(*change)
                pending[change[0]] = change[1]
                continue
            store.snapshot() if change == SNAP else store.commit()
        except NoSpaceLeft as error:
            assert error.errno == errno.ENOSPC and "make room" in str(error)
            full += 1
        if store.num_acknowledged > before:
            values = {key: value for key, value in {**values, **pending}.items() if value is not None}
        pending = {}
        assert dict(store.items()) == values
        store.check_invariants()
    return store, values, full


def test_a_full_disk_costs_what_was_asked_for_and_nothing_else():
    """Every capacity: too small for a store, for a record, for a snapshot beside the log, and large enough."""
    fulls = []
    for capacity in range(0, 1500, 7):
        disk = FaultyDisk(capacity=capacity)
        try:
            store, values, full = tried(disk, SMALL_RUN)
        except NoSpaceLeft:
            assert capacity < 28, "a segment's header has 28 bytes"
            continue
        fulls.append(full)
        assert all(not name.endswith(TEMPORARY) for name in disk.names())
        assert dict(DurableStore(FaultyDisk(disk.files())).items()) == values
    assert fulls[0] >= 5 and fulls[-1] == 0 and len(set(fulls)) > 3


def test_no_power_cut_after_a_full_disk_loses_anything():
    broken = 0
    for capacity in range(28, 1400, 97):
        run = record_run(SMALL_RUN, lambda capacity=capacity: FaultyDisk(capacity=capacity))
        tally = crash_everywhere(run)
        assert tally.exhaustive and tally.points > 5
        broken += tally.broken
    assert broken == 0


def test_a_real_file_that_may_not_grow(tmp_path):
    """RLIMIT_FSIZE: the kernel refuses a part of a write, as a full disk does."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from minilib.classic.write_ahead_log.disks.real_disk import RealDisk\n"
        "from minilib.classic.write_ahead_log.store import DurableStore, NoSpaceLeft\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = DurableStore(RealDisk(Path(sys.argv[1])))\n"
        "store.put(b'small', bytes(500)); store.commit()\n"
        "store.put(b'large', bytes(2000))\n"
        "try:\n    store.commit()\n"
        "except NoSpaceLeft as error:\n    print('full', error.errno)\n"
        "store.check_invariants()\n"
        "store.put(b'after', b'it'); print(store.commit())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_environment())
    assert done.stdout.split() == ["full", str(errno.EFBIG), "2"], done.stderr
    with RealDisk(tmp_path) as disk:
        assert dict(DurableStore(disk).items()) == {b"small": bytes(500), b"after": b"it"}


def test_after_a_failed_fsync_the_store_refuses_to_go_on():
    disk = FaultyDisk(failing_syncs=[3])  # two for the segment, one for each commit
    store = DurableStore(disk)
    store.put(b"a", b"1")
    store.commit()
    store.put(b"a", b"2")
    with pytest.raises(StoreFailed, match="committing 1 records failed: .*fsync of log-000000000000 failed"):
        store.commit()
    for call in (store.commit, store.snapshot, lambda: store.put(b"b", b"3"), lambda: store.delete(b"a")):
        with pytest.raises(StoreFailed, match="what is durable is not known: close this store and open it again"):
            call()
    assert store.get(b"a") == b"1" and store.num_acknowledged == 1, "what was acknowledged may still be read"
    assert disk.num_syncs == 4, "and it syncs no more"
    with pytest.raises(AssertionError, match="committing"):
        store.check_invariants()


def test_whichever_fsync_fails_nothing_acknowledged_is_lost():
    """Nor is it when the store is opened again on what is in memory alone, goes on, and only then the power goes."""
    total = record_run(SMALL_RUN).disk_after(10**6).num_syncs
    failed = 0
    for failing in range(2, total):
        run = record_run(SMALL_RUN, lambda failing=failing: FaultyDisk(failing_syncs=[failing]))
        failed += run.acknowledged[-1][1] < 7
        tally = crash_everywhere(run)
        assert tally.broken == 0 and tally.exhaustive
        again = record_run([(b"late", b"1"), "commit", SNAP], lambda run=run: run.disk_after(len(run.steps)))
        assert again.acknowledged[0][1] >= run.acknowledged[-1][1]
        after = crash_everywhere(continued(run, len(run.steps), again))
        assert after.broken == 0 and after.exhaustive and after.states > 20
    assert failed > total / 2


def test_what_recovery_reads_from_memory_is_written_once_more():
    """After a failed fsync the pages are clean: only a further write takes them to the disk."""
    disk = FaultyDisk(failing_syncs=[2])
    store = DurableStore(disk)
    store.put(b"a", b"in memory")
    with pytest.raises(StoreFailed):
        store.commit()
    assert {state[numbered(LOG, 0)][28:] == b"" for state in disk.power_cut().states} == {True, False}
    again = DurableStore(disk)
    assert again.get(b"a") == b"in memory" and again.num_acknowledged == 1
    assert [state == disk.files() for state in disk.power_cut().states] == [True]


def test_recovery_on_a_disk_that_does_not_sync_fails():
    disk = FaultyDisk(failing_syncs=[3])
    store = DurableStore(disk)
    store.put(b"a", b"1")
    store.commit()
    with pytest.raises(SyncFailed):
        DurableStore(disk)


def test_a_real_fsync_that_fails_is_named(tmp_path, monkeypatch):
    with RealDisk(tmp_path) as disk:
        store = DurableStore(disk)
        store.put(b"a", b"1")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(StoreFailed, match="fsync of log-000000000000 failed: Input/output error"):
            store.commit()


def test_whatever_else_breaks_off_a_step_stops_the_store():
    class Interrupted(FaultyDisk):
        armed = False

        def run(self, steps):
            for number, step in enumerate(steps):
                super().run([step])
                if self.armed and number == 0:
                    raise KeyboardInterrupt

    disk = Interrupted()
    store = DurableStore(disk)
    store.put(b"a", b"1")
    disk.armed = True
    with pytest.raises(KeyboardInterrupt):
        store.commit()
    disk.armed = False
    with pytest.raises(StoreFailed, match="committing 1 records was interrupted"):
        store.commit()
    assert DurableStore(disk).num_acknowledged == 1


def test_an_error_that_is_no_full_disk_stops_the_store(tmp_path):
    with RealDisk(tmp_path) as disk:
        store = DurableStore(disk)
        store.put(b"a", b"1")
        store.snapshot()
        for path in tmp_path.iterdir():
            path.unlink()
        tmp_path.rmdir()
        store.put(b"b", b"2")
        with pytest.raises(StoreFailed, match="No such file"):
            store.snapshot()
        tmp_path.mkdir()
