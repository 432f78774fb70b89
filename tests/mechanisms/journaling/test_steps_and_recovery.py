"""Plans are steps in the right order; manifests tell whole parts from others; recovery reads what it needs."""

import pytest

from minilib.mechanisms.journaling import (
    CreateFile,
    Manifest,
    ManifestDamaged,
    ManifestEntry,
    PartDamaged,
    RemoveFile,
    RenameFile,
    Replay,
    SegmentMissing,
    SyncFile,
    SyncFolder,
    UnknownFormat,
    WriteFile,
    append,
    commit,
    digest,
    expendable_segments,
    folder_of,
    numbered,
    numbers_of,
    publish,
    replay_order,
    retained,
    retire,
)

PARTS = {"step/part-0": b"zero" * 50, "step/part-1": memoryview(b"one")}
MANIFEST = Manifest(12, {name: ManifestEntry.of(data) for name, data in PARTS.items()}, {"mesh": [2, 2]})


def test_a_file_is_synced_before_its_name_changes_and_the_folder_after():
    assert publish("a/file", b"data") == [
        CreateFile("a/file.partial"),
        WriteFile("a/file.partial", b"data"),
        SyncFile("a/file.partial"),
        RenameFile("a/file.partial", "a/file"),
        SyncFolder("a"),
    ]
    assert append("log", b"r", 9) == [WriteFile("log", b"r", 9), SyncFile("log")]
    assert (folder_of("file"), folder_of("a/b/file")) == ("", "a/b")


def test_the_manifest_comes_last_and_goes_first():
    steps = list(commit("step/manifest", MANIFEST.packed(), PARTS))
    rename = steps.index(RenameFile("step/manifest.partial", "step/manifest"))
    assert rename == len(steps) - 2 and steps[-1] == SyncFolder("step")
    before = steps[: steps.index(CreateFile("step/manifest.partial"))]
    assert {SyncFile(name) for name in PARTS} < set(before) and before[-1] == SyncFolder("step")
    assert sum(isinstance(step, SyncFile | SyncFolder) for step in steps) == len(PARTS) + 3
    assert retire("step/manifest", ["step/part-0"]) == [
        RemoveFile("step/manifest"),
        SyncFolder("step"),
        RemoveFile("step/part-0"),
    ]


def test_a_manifest_gives_back_what_it_was_made_of():
    assert Manifest.unpacked(MANIFEST.packed()) == MANIFEST
    assert Manifest.unpacked(Manifest(0, {}).packed()) == Manifest(0, {})
    MANIFEST.check(PARTS)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        Manifest(-1, {})


def test_a_manifest_that_is_torn_or_changed_is_none():
    whole = MANIFEST.packed()
    for size in range(len(whole)):
        with pytest.raises(ManifestDamaged, match="step-12"):
            Manifest.unpacked(whole[:size], "step-12")
    for at in range(len(whole)):
        with pytest.raises(ManifestDamaged):
            Manifest.unpacked(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ManifestDamaged):
        Manifest.unpacked(whole + b"more")


def test_a_whole_manifest_of_another_version_is_named():
    for line in (MANIFEST.packed().split(b"\n")[0].replace(b"manifest 1", b"manifest 2") + b"\n", b"[1]\n"):
        with pytest.raises(UnknownFormat, match="'journal manifest 2'|None"):
            Manifest.unpacked(line + digest([line]).encode() + b"\n")


@pytest.mark.parametrize("algorithm", ["sha256", "crc32"])
def test_a_part_that_differs_is_named(algorithm):
    entry = ManifestEntry.of(b"content", algorithm)
    entry.check("part", b"content")
    assert digest([b"con", memoryview(b"tent")], algorithm) == entry.digest
    with pytest.raises(PartDamaged, match="part has the digest"):
        entry.check("part", b"contenT")
    with pytest.raises(PartDamaged, match="part has 6 bytes, and the manifest says 7"):
        entry.check("part", b"conten")
    with pytest.raises(PartDamaged, match="p is missing"):
        Manifest(1, {"p": entry}).check({})
    with pytest.raises(ValueError, match="one of sha256, crc32; got 'md5'"):
        digest([], "md5")


def test_digests_are_those_of_the_standard():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4's of no bytes
    assert digest([]) == f"sha256:{empty}" and digest([b"123456789"], "crc32") == "crc32:cbf43926"


def test_names_sort_as_numbers_do():
    assert numbered("log", 40) == "log-000000000040"
    names = [numbered("log", number) for number in (100, 9, 0)]
    others = [
        "log-1",
        "log-000000000009.partial",
        "log-00000000000x",
        "snapshot-000000000005",
        "log",
        "log-00000000001²",
    ]
    assert numbers_of("log", names + others) == [0, 9, 100]


def test_recovery_reads_from_the_segment_that_the_snapshot_ends_in():
    assert replay_order(0, [0]) == [Replay(0, 0)]
    assert replay_order(0, [40, 0, 75]) == [Replay(0, 40), Replay(40, 75), Replay(75, 0)]
    assert replay_order(40, [0, 40, 75]) == [Replay(40, 75), Replay(75, 0)]
    assert replay_order(50, [0, 40, 75]) == [Replay(40, 75), Replay(75, 0)]
    assert replay_order(80, [0, 40, 75]) == [Replay(75, 0)]
    with pytest.raises(SegmentMissing, match="covers 39 records, and the log begins with record 40"):
        replay_order(39, [40, 75])
    with pytest.raises(SegmentMissing, match="there is no log"):
        replay_order(5, [])


def test_what_no_recovery_needs_may_go():
    assert retained([30, 10, 20], 2) == [20, 30] and retained([], 1) == [] and retained([5], 3) == [5]
    with pytest.raises(ValueError, match="keep is 1 or more, got 0"):
        retained([5], 0)
    assert expendable_segments(40, [0, 20, 40, 75]) == [0, 20]
    assert expendable_segments(39, [0, 20, 40, 75]) == [0]
    assert expendable_segments(99, [0]) == [] and expendable_segments(99, []) == []


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_is_left_is_enough_to_start_from_each_snapshot_kept(keep):
    snapshots, segments = [10, 25, 40], [0, 10, 25, 40]
    kept = retained(snapshots, keep)
    left = sorted(set(segments) - set(expendable_segments(kept[0], segments)))
    for snapshot in kept:
        assert replay_order(snapshot, left)[0].first == snapshot
    assert left[0] == kept[0], "and no more than that"
