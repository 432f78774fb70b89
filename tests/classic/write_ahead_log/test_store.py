"""The store gives back what was acknowledged, refuses what it cannot read by name, and stops after a failed fsync."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk
from minilib.classic.write_ahead_log.disks.real_disk import DiskInUse, RealDisk
from minilib.classic.write_ahead_log.restart import LOG, MANIFEST, SNAPSHOT
from minilib.classic.write_ahead_log.store import DurableStore
from minilib.mechanisms.basics.child import child_environment
from minilib.mechanisms.journaling import (
    JournalDamaged,
    RecordDamaged,
    SegmentMissing,
    UnknownFormat,
    numbered,
    numbers_of,
    segment_header,
)


def filled(disk, groups=3, **arguments):
    """A store with a group of two records for each number."""
    store = DurableStore(disk, **arguments)
    for number in range(groups):
        store.put(b"number", b"%d" % number)
        store.put(b"key %d" % number, bytes(number))
        store.commit()
    return store


def reopened(disk, **arguments):
    return DurableStore(FaultyDisk(disk.files()), **arguments)


@pytest.fixture(params=["simulated", "real"])
def disk(request, tmp_path):
    if request.param == "simulated":
        yield FaultyDisk()
        return
    with RealDisk(tmp_path) as real:
        yield real


def test_what_was_committed_is_there_again(disk):
    store = filled(disk)
    store.delete(b"key 0")
    assert store.get(b"key 0") == b"", "not before it is committed"
    assert store.commit() == 7 == store.num_acknowledged
    again = DurableStore(disk)
    assert dict(again.items()) == {b"number": b"2", b"key 1": b"\0", b"key 2": b"\0\0"} and len(again) == 3
    assert again.get(b"key 0") is None and again.num_acknowledged == 7
    again.check_invariants()


def test_nothing_is_durable_without_a_commit_and_an_empty_commit_costs_nothing():
    disk = FaultyDisk()
    store = DurableStore(disk)
    assert store.put(b"a", b"1") == 0 and store.put(b"a", b"2") == 1 and store.delete(b"never") == 2
    assert reopened(disk).num_acknowledged == 0
    assert store.commit() == 3
    before = disk.num_syncs
    assert store.commit() == 3 and disk.num_syncs == before
    assert dict(reopened(disk).items()) == {b"a": b"2"}


def test_a_snapshot_cuts_the_log_short(disk):
    store = filled(disk)
    assert store.snapshot() == 6 and store.log_bytes == 28
    kinds = [name.partition("-")[0] for name in disk.names() if name != "lock"]
    assert sorted(kinds) == sorted([LOG, MANIFEST, SNAPSHOT])
    store.put(b"after", b"it")
    store.commit()
    store.check_invariants()
    again = DurableStore(disk)
    assert again.recovered.replayed == 1 and again.recovered.snapshot == 6 and again.get(b"after") == b"it"
    assert dict(again.items()) == dict(store.items())
    assert again.snapshot() == again.snapshot() == 7, "a second one has nothing to do"


def test_fsyncs_are_those_that_the_docstrings_say():
    disk = FaultyDisk()
    store = DurableStore(disk)
    counts = [disk.num_syncs]
    for _ in range(2):
        store.put(b"a", b"b")
        store.commit()
        counts.append(disk.num_syncs)
        store.snapshot()
        counts.append(disk.num_syncs)
    store.put(b"a", b"c")
    store.snapshot()
    counts.append(disk.num_syncs)
    assert [after - before for before, after in zip([0, *counts], counts, strict=False)] == [2, 1, 6, 1, 7, 8]


def test_snapshots_are_kept_and_an_older_one_serves(disk):
    store = DurableStore(disk, keep=2)
    for number in range(4):
        store.put(b"number", b"%d" % number)
        store.snapshot()
    assert numbers_of(MANIFEST, disk.names()) == [3, 4] == numbers_of(LOG, disk.names())
    store.check_invariants()


def test_a_damaged_snapshot_costs_nothing_while_an_older_one_and_the_log_are_kept():
    disk = FaultyDisk()
    store = filled(disk, keep=2)
    store.snapshot()
    store.put(b"late", b"1")
    store.snapshot()
    for name in (numbered(SNAPSHOT, 7), numbered(MANIFEST, 7)):
        for data in (b"", disk.files()[name][:-1], b"?" + disk.files()[name][1:]):
            damaged = FaultyDisk({**disk.files(), name: data})
            again = DurableStore(damaged, keep=2)
            assert dict(again.items()) == dict(store.items()) and again.recovered.snapshot == 6
            assert len(again.recovered.skipped) == 1 and name in again.recovered.skipped[0]
            again.check_invariants()
            assert numbers_of(MANIFEST, damaged.names()) == [6], "what could not be used is gone"
            again.put(b"later", b"2")
            assert again.snapshot() == 8 and dict(reopened(damaged, keep=2).items()) == dict(again.items())


def test_with_fewer_snapshots_than_are_kept_the_whole_log_is():
    disk = FaultyDisk()
    store = filled(disk, keep=2)
    store.snapshot()
    again = DurableStore(FaultyDisk({**disk.files(), numbered(SNAPSHOT, 6): b"?"}), keep=2)
    assert dict(again.items()) == dict(store.items()) and again.recovered.replayed == 6
    again.check_invariants()


def test_the_only_snapshot_damaged_is_an_error_by_name():
    disk = FaultyDisk()
    filled(disk).snapshot()
    for name in (numbered(SNAPSHOT, 6), numbered(MANIFEST, 6)):
        with pytest.raises(JournalDamaged, match=name):
            DurableStore(FaultyDisk({**disk.files(), name: b"?"}))
        missing = {other: data for other, data in disk.files().items() if other != name}
        with pytest.raises(SegmentMissing if MANIFEST in name else JournalDamaged):
            DurableStore(FaultyDisk(missing))


def test_a_missing_segment_is_an_error_by_name():
    disk = FaultyDisk()
    store = filled(disk, keep=2)
    for key in (b"first", b"second"):
        store.snapshot()
        store.put(key, b"1")
        store.commit()
    without = {name: data for name, data in disk.files().items() if name != numbered(LOG, 7)}
    with pytest.raises(RecordDamaged, match=r"record 7, .*as the caller knows"):
        DurableStore(FaultyDisk({**without, numbered(LOG, 9): segment_header(9, 1)}))
    with pytest.raises(SegmentMissing, match="covers 7 records, and there is no log"):
        DurableStore(FaultyDisk({name: data for name, data in without.items() if not name.startswith(LOG)}))


def test_every_bit_of_what_was_durable():
    """A flipped bit in front of the last group is an error; in the last group a shorter log; never a wrong value."""
    disk = FaultyDisk()
    store = DurableStore(disk)
    history = [{}]
    for number in range(3):
        store.put(b"k", b"%d" % number)
        store.commit()
        history.append(dict(store.items()))
    data, last = disk.read(numbered(LOG, 0)), store.log_bytes - 39
    for at in range(len(data)):
        for bit in range(8):
            changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            files = {numbered(LOG, 0): changed}
            if at < last:
                with pytest.raises((JournalDamaged, UnknownFormat)):
                    DurableStore(FaultyDisk(files))
            else:
                again = DurableStore(FaultyDisk(files))
                assert (again.num_acknowledged, dict(again.items())) == (2, history[2])


def test_a_torn_tail_is_cut_for_good_and_new_records_go_there():
    disk = FaultyDisk()
    store = filled(disk)
    whole = disk.read(numbered(LOG, 0))
    torn = FaultyDisk({numbered(LOG, 0): whole + b"half a reco"})
    again = DurableStore(torn)
    assert again.recovered.torn_bytes == 11 and torn.read(numbered(LOG, 0)) == whole
    assert dict(again.items()) == dict(store.items())
    again.check_invariants()
    assert all(state == torn.files() for state in torn.power_cut().states), "nothing of it is left to the power"


def test_no_folder_another_process_and_another_format_are_named(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere is no folder"):
        RealDisk(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is no folder"):
        RealDisk(tmp_path / "file")
    code = (
        "import sys\nfrom pathlib import Path\nfrom minilib.classic.write_ahead_log.disks.real_disk import RealDisk\n"
    )
    code += "disk = RealDisk(Path(sys.argv[1]))\nprint('locked', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": child_environment()}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DiskInUse, match="is in use"):
            RealDisk(tmp_path)
        other.kill()
    with RealDisk(tmp_path), pytest.raises(DiskInUse):
        RealDisk(tmp_path)
    (tmp_path / numbered(LOG, 0)).write_bytes(b"SQLite format 3\0" + bytes(100))
    with RealDisk(tmp_path) as disk, pytest.raises(UnknownFormat, match="SQLite"):
        DurableStore(disk)


def test_what_is_no_key_or_value_is_refused_before_it_is_in_a_group():
    store = DurableStore(FaultyDisk())
    for key, value in (("text", b""), (b"", None), (1, b"")):
        with pytest.raises(TypeError, match="is bytes, got"):
            store.put(key, value)
    with pytest.raises(ValueError, match="at most 67,108,864 bytes"):
        store.put(b"", bytes(1 << 26))
    assert store.put(b"", b"") == 0 and store.commit() == 1 and store.get(b"") == b""
    with pytest.raises(ValueError, match="keep is 1 or more"):
        DurableStore(FaultyDisk(), keep=0)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.binary(max_size=2), st.one_of(st.none(), st.binary(max_size=20))),
        st.sampled_from(["commit", "snapshot", "reopen"]),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(CHANGES, st.integers(1, 3))
def test_the_store_is_a_dictionary(changes, keep):
    disk, durable, pending = FaultyDisk(), {}, {}
    store = DurableStore(disk, keep)
    for change in changes:
        if change == "reopen":
            disk, pending = FaultyDisk(disk.files()), {}
            store = DurableStore(disk, keep)
        elif isinstance(change, str):
            getattr(store, change)()
            durable = {key: value for key, value in {**durable, **pending}.items() if value is not None}
            pending = {}
        else:
            key, value = change
            store.delete(key) if value is None else store.put(key, value)
            pending[key] = value
        assert dict(store.items()) == durable
        store.check_invariants()
