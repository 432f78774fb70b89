"""The simulated disk leaves what POSIX allows and no more, reads as a real one does, and fails when it is told to."""

import errno
import itertools
import os
import random

import pytest

from minilib.classic.write_ahead_log.disks import real_disk
from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk
from minilib.classic.write_ahead_log.disks.real_disk import RealDisk
from minilib.mechanisms.journaling import (
    CreateFile,
    CutFile,
    MakeFolder,
    RemoveFile,
    RenameFile,
    SyncFailed,
    SyncFile,
    SyncFolder,
    WriteFile,
    publish,
    write_part,
)


def states(disk):
    left = disk.power_cut()
    assert left.exhaustive
    return [tuple(sorted(files.items())) for files in left.states]


def test_a_written_page_may_be_there_or_not_each_for_itself():
    disk = FaultyDisk({"f": b"aabb"}, page_size=2)
    disk.run([WriteFile("f", b"xxyy")])
    assert disk.read("f") == b"xxyy"
    expected = [a + b for a, b in itertools.product((b"aa", b"xx"), (b"bb", b"yy"))]
    assert sorted(data for ((_, data),) in states(disk)) == sorted(expected)
    disk.run([SyncFile("f")])
    assert states(disk) == [(("f", b"xxyy"),)] and disk.pages_flushed == 2


def test_a_page_written_twice_may_be_there_in_either_version():
    disk = FaultyDisk({"f": b"1"})
    disk.run([WriteFile("f", b"2"), WriteFile("f", b"3")])
    assert sorted(data for ((_, data),) in states(disk)) == [b"1", b"2", b"3"]


def test_a_file_that_grew_may_be_short_or_hold_zeros():
    disk = FaultyDisk({"f": b""}, page_size=2)
    disk.run([WriteFile("f", b"abcd")])
    assert {data for ((_, data),) in states(disk)} == {b"", b"\0\0\0\0", b"ab\0\0", b"\0\0cd", b"abcd"}


def test_a_cut_happens_or_not_and_what_is_behind_it_comes_with_it():
    disk = FaultyDisk({"f": b"aabbcc"}, page_size=2)
    disk.run([CutFile("f", 3), WriteFile("f", b"Z", 3)])
    assert disk.read("f") == b"aabZ"
    assert {data for ((_, data),) in states(disk)} == {b"aabbcc", b"aab", b"aab\0", b"aabZ"}
    disk.run([SyncFile("f")])
    assert states(disk) == [(("f", b"aabZ"),)]
    disk.run([CutFile("f", 6)])
    assert disk.read("f") == b"aabZ\0\0"


def test_names_are_durable_once_the_folder_is_and_a_rename_is_never_half_done():
    disk = FaultyDisk({"f": b"old"})
    disk.run([CreateFile("t"), WriteFile("t", b"new"), SyncFile("t"), RenameFile("t", "f")])
    assert disk.names() == ["f"] and disk.read("f") == b"new"
    assert set(states(disk)) == {(("f", b"old"),), (("f", b"old"), ("t", b"new")), (("f", b"new"),)}
    disk.run([SyncFolder()])
    assert states(disk) == [(("f", b"new"),)]
    disk.run([RemoveFile("f"), RemoveFile("never")])
    assert len(states(disk)) == 2 and disk.names() == []
    with pytest.raises(FileNotFoundError):
        disk.read("f")


def test_a_file_synced_in_a_folder_that_is_not_may_have_no_name():
    disk = FaultyDisk()
    disk.run([MakeFolder("d"), *write_part("d/f", b"x"), SyncFolder("d")])
    assert disk.names("d") == ["f"] and disk.names() == [] and set(states(disk)) == {(), (("d/f", b"x"),)}
    disk.run([SyncFolder()])
    assert states(disk) == [(("d/f", b"x"),)]
    with pytest.raises(FileNotFoundError, match="no folder e"):
        disk.run([CreateFile("e/f")])
    assert FaultyDisk({"a/b/c": b"x"}).power_cut().states == ({"a/b/c": b"x"},)


def test_publishing_leaves_the_old_file_or_the_new_one_at_every_step():
    steps = publish("f", b"new " * 40)
    for count in range(len(steps) + 1):
        disk = FaultyDisk({"f": b"old"})
        disk.run(steps[:count])
        found = {dict(state)["f"] for state in states(disk)}
        assert found <= {b"old", b"new " * 40} and (count < len(steps) or found == {b"new " * 40})


def test_a_failed_fsync_leaves_pages_that_a_further_one_does_not_write():
    disk = FaultyDisk({"f": b"old"}, failing_syncs=[0])
    disk.run([WriteFile("f", b"new")])
    with pytest.raises(SyncFailed) as raised:
        disk.run([SyncFile("f")])
    assert raised.value.errno == errno.EIO and isinstance(raised.value, OSError)
    disk.run([SyncFile("f")])
    assert disk.read("f") == b"new" and len(states(disk)) == 2, "and yet it may be lost"
    disk.run([WriteFile("f", b"new"), SyncFile("f")])
    assert states(disk) == [(("f", b"new"),)]


def test_a_full_disk_writes_what_fits():
    disk = FaultyDisk({"f": b"1234"}, capacity=10)
    with pytest.raises(OSError, match="no space left") as raised:
        disk.run([CreateFile("g"), WriteFile("g", b"abcdefgh")])
    assert raised.value.errno == errno.ENOSPC and disk.read("g") == b"abcdef"
    with pytest.raises(OSError, match="no space left"):
        disk.run([WriteFile("g", b"x", 9)])
    assert disk.read("g") == b"abcdef"


def test_too_many_states_are_chosen_from_by_chance_and_the_same_ones_again():
    disk = FaultyDisk({"f": bytes(64)}, page_size=1)
    disk.run([WriteFile("f", b"x" * 64)])
    left = disk.power_cut(limit=50, seed=3)
    assert not left.exhaustive and 50 < len(left.states) <= 52
    assert {"f": bytes(64)} in left.states and {"f": b"x" * 64} in left.states, "all lost, and all kept, among them"
    assert left == disk.power_cut(limit=50, seed=3) != disk.power_cut(limit=50, seed=4)


def test_both_disks_read_alike_whatever_the_steps(tmp_path):
    """The oracle of the simulated disk while there is power: the kernel."""
    for seed in range(20):
        rng, simulated = random.Random(seed), FaultyDisk(page_size=8)
        folder = tmp_path / str(seed)
        folder.mkdir()
        with RealDisk(folder) as real:
            for _ in range(60):
                names = [f"d/{name}" for name in simulated.names("d")] + simulated.names()
                name = rng.choice(["a", "b", "d/c"]) if not names or rng.random() < 0.3 else rng.choice(names)
                steps = [MakeFolder("d")]
                if name not in names:
                    steps += [CreateFile(name)]
                steps += rng.choice(
                    [
                        [WriteFile(name, rng.randbytes(rng.randrange(30)), rng.randrange(20))],
                        [CutFile(name, rng.randrange(30)), SyncFile(name)],
                        [CreateFile(name), SyncFolder("d")],
                        [RenameFile(name, rng.choice(["d/e", "d/c"] if "/" in name else ["a", "e"]))],
                        [RemoveFile(name), SyncFolder()],
                    ]
                )
                for disk in (simulated, real):
                    disk.run(steps)
                assert [name for name in real.names() if name != "lock"] == simulated.names()
                assert real.names("d") == simulated.names("d")
                for name, data in simulated.files().items():
                    assert real.read(name) == data
    assert simulated.num_syncs > 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
def test_the_kernel_is_told_to_write_what_no_fsync_has_written(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: told.append((start, size, advice)))
    monkeypatch.setattr(real_disk, "WRITEBACK", 100)
    with RealDisk(tmp_path) as disk:
        disk.run([CreateFile("f"), *(WriteFile("f", bytes(30), at) for at in range(0, 300, 30))])
        expected = [(0, 120, os.POSIX_FADV_DONTNEED), (120, 120, os.POSIX_FADV_DONTNEED)]
        assert told == expected, "each byte once, and the last 60 not yet"
        disk.run([SyncFile("f"), WriteFile("f", bytes(90), 300), WriteFile("f", bytes(90), 1000)])
        assert told == expected, "what is synced, and what lies elsewhere, does not count"
        disk.run([WriteFile("f", bytes(500), 1090)])
        assert told[2:] == [(1000, 590, os.POSIX_FADV_DONTNEED)]
