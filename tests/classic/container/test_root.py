"""A copy-on-write root: who writes it changes nothing below; beside what the kernel leaves in the upper folder."""

import hashlib
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from minilib.classic.container import (
    CannotContain,
    Container,
    OverlayRoot,
    RootChanges,
    lay_out,
    look_around,
    run_in_container,
)
from minilib.classic.container.namespaces import in_user_namespace, kinds_for_us
from minilib.classic.container.syscalls import mount
from tests.classic.container import work
from tests.classic.container.work import MIB

OVERLAY = pytest.mark.usefixtures("namespaces", "overlay")
BIG = random.Random(0).randbytes(8 * MIB)


@pytest.fixture
def layer(tmp_path):
    """An image of one layer, which has to be the same afterwards."""
    made = lay_out(tmp_path / "layer", {"etc/name": b"image\n", "etc/other": b"", "data": BIG, "empty": b""})
    before = digest(made)
    yield made
    assert digest(made) == before


def digest(folder):
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.update(f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}".encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.digest()


def change(path, position, content):
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(position)
        file.write(content)


@OVERLAY
def test_a_container_sees_its_root_and_nothing_of_the_host(layer, tmp_path):
    with OverlayRoot(layer, folder=tmp_path) as root:
        listed, seen = run_in_container(lambda: (work.names("/"), look_around()), root=root).value
        assert listed == ["data", "empty", "etc", "proc"]
        assert seen.mounts == ("/", "/proc") and seen.processes == (1,)
        assert root.changes() == RootChanges((), (), 0)


@OVERLAY
def test_no_way_leads_out_of_the_root(layer, tmp_path):
    def climb():
        os.chdir("/etc")
        return work.names("../../../.."), layer.exists()

    with OverlayRoot(layer, folder=tmp_path) as root:
        assert run_in_container(climb, root=root).value == (["data", "empty", "etc", "proc"], False)


@OVERLAY
def test_writes_are_above_and_deletes_are_whiteouts(layer, tmp_path):
    def work_on_it():
        Path("/etc/name").write_text("container\n")
        Path("/var/log").mkdir(parents=True)
        Path("/var/log/new").write_text("line\n")
        Path("/etc/other").unlink()
        Path("/empty").unlink()
        return sorted(path.as_posix() for path in Path("/etc").iterdir())

    with OverlayRoot(layer, folder=tmp_path) as root:
        assert run_in_container(work_on_it, root=root).value == ["/etc/name"]
        assert root.changes() == RootChanges(("etc/name", "var/log/new"), ("empty", "etc/other"), 15)
        assert (root.upper / "etc/name").read_text() == "container\n"
        assert (layer / "etc/name").read_text() == "image\n"
        for name in ("empty", "etc/other"):
            status = (root.upper / name).lstat()
            assert stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(0, 0)
        assert run_in_container(lambda: Path("/etc/name").read_text(), root=root).value == "container\n"


@OVERLAY
@pytest.mark.parametrize("position", [0, 4 * MIB + 1, 8 * MIB - 1])
def test_one_byte_changed_copies_the_whole_file(layer, tmp_path, position):
    with OverlayRoot(layer, folder=tmp_path) as root:
        assert run_in_container(lambda: change("/data", position, b"\0"), root=root).status == 0
        assert root.changes() == RootChanges(("data",), (), 8 * MIB)
        assert (root.upper / "data").stat().st_blocks * 512 >= 8 * MIB
        expected = bytearray(BIG)
        expected[position] = 0
        assert (root.upper / "data").read_bytes() == expected


@OVERLAY
def test_reading_copies_nothing_and_appending_all(layer, tmp_path):
    with OverlayRoot(layer, folder=tmp_path) as root:
        assert run_in_container(lambda: len(Path("/data").read_bytes()), root=root).value == 8 * MIB
        assert root.changes().bytes_in_upper == 0
        run_in_container(lambda: change("/data", 8 * MIB, b"x"), root=root)
        assert root.changes().bytes_in_upper == 8 * MIB + 1


@OVERLAY
def test_a_folder_deleted_and_made_anew_hides_the_one_below(layer, tmp_path):
    def renew():
        shutil.rmtree("/etc")
        Path("/etc").mkdir()
        Path("/etc/name").write_text("new")
        return work.names("/etc")

    if "user" in kinds_for_us():
        try:
            os.setxattr(tmp_path, "user.mark", b"y")
        except OSError:
            pytest.skip("the folder's filesystem keeps no attributes of users, as tmpfs before Linux 6.6")
    with OverlayRoot(layer, folder=tmp_path) as root:
        assert run_in_container(renew, root=root).value == ["name"]
        assert root.changes() == RootChanges(("etc/name",), ("etc/other",), 3)


@OVERLAY
def test_two_containers_at_once_share_a_layer(layer, tmp_path):
    def write(name):
        Path("/etc/name").write_text(name)
        work.hang()

    def started(container):
        while not Path(f"/proc/{container.pid}/root/etc/name").read_text():
            pass
        return Path(f"/proc/{container.pid}/root/etc/name").read_text()

    with OverlayRoot(layer, folder=tmp_path) as first, OverlayRoot(layer, folder=tmp_path) as second:
        with Container(lambda: write("a"), root=first) as one, Container(lambda: write("b"), root=second) as other:
            while started(one) != "a" or started(other) != "b":
                pass
            with pytest.raises(ValueError, match="another container uses this root"):
                run_in_container(int, root=first)
        assert (first.upper / "etc/name").read_text() == "a" and (second.upper / "etc/name").read_text() == "b"
        assert run_in_container(int, root=first).status == 0, "a root may be used again"


@OVERLAY
def test_a_running_container_mounts_nothing_that_the_host_sees(layer, tmp_path):
    before = Path("/proc/self/mountinfo").read_text()
    with OverlayRoot(layer, folder=tmp_path) as root, Container(work.hang, root=root) as container:
        assert Path("/proc/self/mountinfo").read_text() == before
        findmnt = shutil.which("findmnt") or pytest.skip("findmnt of util-linux is not here")
        words = [findmnt, "--noheadings", "--list", "--output", "TARGET,FSTYPE", "--task", str(container.pid)]
        found = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        assert [line.split() for line in found.splitlines()] == [["/", "overlay"], ["/proc", "proc"]]


@OVERLAY
def test_of_layers_the_highest_counts(layer, tmp_path):
    above = lay_out(tmp_path / "above", {"etc/name": b"above\n", "more": b""})
    with OverlayRoot(layer, above, folder=tmp_path) as root:
        seen = run_in_container(lambda: (Path("/etc/name").read_text(), work.names("/")), root=root).value
        assert seen == ("above\n", ["data", "empty", "etc", "more", "proc"])


@OVERLAY
@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b", "a b", "ä"])
def test_a_layer_may_have_any_name(tmp_path, name):
    layer = lay_out(tmp_path / name, {"file": b"x"})
    (tmp_path / f"{name}-folder").mkdir()
    with OverlayRoot(layer, folder=tmp_path / f"{name}-folder") as root:
        assert run_in_container(lambda: Path("/file").read_text(), root=root).value == "x"


@OVERLAY
def test_a_root_on_an_overlay_is_refused_by_name(layer, tmp_path):
    """As in Docker, where all that is no volume lies on one."""
    for name in ("up", "work", "merged"):
        (tmp_path / name).mkdir()

    def inside():
        options = f"lowerdir={layer},upperdir={tmp_path}/up,workdir={tmp_path}/work"
        mount("overlay", f"{tmp_path}/merged", "overlay", 0, options + ",userxattr" * in_user_namespace())
        with OverlayRoot(layer, folder=tmp_path / "merged") as root:
            try:
                run_in_container(int, root=root)
            except CannotContain as error:
                return error.part, error.remedy

    part, remedy = run_in_container(inside).value
    assert part == "overlay" and "overlay" in remedy
    (tmp_path / "work" / "work").chmod(0o700)


@OVERLAY
def test_what_a_container_locks_is_removed_all_the_same(layer, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)

    def lock():
        Path("/etc/locked/deep").mkdir(parents=True)
        Path("/etc/locked").chmod(0)
        Path("/link").symlink_to(outside)

    with OverlayRoot(layer, folder=tmp_path) as root:
        assert run_in_container(lock, root=root).status == 0
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755, "a link is not followed"


def test_layers_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one layer"):
        OverlayRoot()
    with pytest.raises(NotADirectoryError, match="no folder"):
        OverlayRoot(tmp_path / "missing")
    assert not list(tmp_path.iterdir())
    for name in ("../out", "/etc/out", "a/../../out"):
        with pytest.raises(ValueError, match="leads out of the layer"):
            lay_out(tmp_path / "layer", {name: b""})
    for name in ("", ".", "a/.."):
        with pytest.raises(ValueError, match="leads out of the layer"):
            lay_out(tmp_path / "layer", {"first": b"", name: b""})
    assert not list(tmp_path.iterdir()), "nothing was made"
    assert lay_out(tmp_path / "empty", {}).is_dir()


@OVERLAY
def test_what_a_file_or_a_whiteout_hides_is_deleted(tmp_path):
    """All paths of the layer that the container no longer sees, however it lost them."""
    layer = lay_out(tmp_path / "layer", {"d/f": b"", "g": b"", "h/a": b"", "h/b/c": b"", "kept/x": b""})

    def change():
        shutil.rmtree("/d")
        Path("/d").write_text("a file now")
        Path("/g").unlink()
        Path("/g").mkdir()
        shutil.move("/h", "/k")
        return sorted(path.as_posix()[1:] for path in Path("/").rglob("*") if path.parts[1] != "proc")

    with OverlayRoot(layer, folder=tmp_path) as root:
        seen = set(run_in_container(change, root=root).value)
        before = {path.relative_to(layer).as_posix() for path in layer.rglob("*")}
        assert set(root.changes().deleted) == before - seen == {"d/f", "h", "h/a", "h/b", "h/b/c"}
        assert root.changes().written == ("d", "k/a", "k/b/c")


@OVERLAY
def test_a_root_whose_body_is_over_is_refused(layer, tmp_path):
    with OverlayRoot(layer, folder=tmp_path) as root:
        pass
    for ask in (lambda: run_in_container(int, root=root), root.changes):
        with pytest.raises(ValueError, match="deleted at the end of its body"):
            ask()


@OVERLAY
def test_a_layer_twice_and_changes_inside_of_a_layer_are_named(layer):
    for layers in ((layer, layer), (layer,)):
        with (
            OverlayRoot(*layers, folder=layer) as root,
            pytest.raises(CannotContain, match="given twice, or"),
        ):
            run_in_container(int, root=root)
