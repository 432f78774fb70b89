"""What a process in namespaces of its own takes for its machine; beside lsns, unshare(1) and /proc."""

import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from minilib.classic.container import Container, look_around, namespaces_of, run_in_container
from minilib.classic.container.namespaces import kinds_for_us
from minilib.mechanisms.basics.child import child_environment
from tests.classic.container import work

ISOLATED = pytest.mark.usefixtures("namespaces")
SURVEY = "from minilib.classic.container import survey_kernel; import json; print(json.dumps(survey_kernel()))"
_SECCOMP = """
import ctypes, json, platform, struct
DENIED = {"x86_64": 272, "aarch64": 97}[platform.machine()]  # unshare
instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, DENIED), (0x06, 0, 0, 0x0005_0001), (0x06, 0, 0, 0x7FFF_0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
filter = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(program))
assert libc.prctl(22, 2, filter) == 0, ctypes.get_errno()
"""


def tool(name):
    return shutil.which(name) or pytest.skip(f"{name} of util-linux is not here")


def surveyed(*before):
    """What a new process finds that these words start."""
    words = [*before, sys.executable, "-c", SURVEY]
    done = subprocess.run(words, env=child_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@ISOLATED
def test_a_process_is_number_one_alone_on_a_host_of_its_own():
    before = look_around()
    seen = run_in_container(look_around, hostname="box").value
    assert (seen.pid, seen.processes, seen.hostname, seen.interfaces) == (1, (1,), "box", ("lo",))
    assert seen.user == 0
    after = look_around()
    assert (after.hostname, after.interfaces, after.mounts) == (before.hostname, before.interfaces, before.mounts)
    assert after.namespaces == before.namespaces and socket.gethostname() != "box"


@ISOLATED
def test_its_namespaces_are_inodes_that_nobody_else_has():
    ours = namespaces_of("self")
    with Container(["sleep", "60"]) as one, Container(["sleep", "60"]) as other:
        for kind in kinds_for_us():
            assert len({ours[kind], namespaces_of(one.pid)[kind], namespaces_of(other.pid)[kind]}) == 3, kind
        shared = set(ours) - set(kinds_for_us())
        assert all(namespaces_of(one.pid)[kind] == ours[kind] for kind in shared)
        numbers = Path(f"/proc/{one.pid}/status").read_text().split("NSpid:")[1].splitlines()[0].split()
        assert numbers[-2:] == [str(one.pid), "1"]


@ISOLATED
def test_lsns_finds_the_same_inodes():
    lsns = tool("lsns")
    with Container(["sleep", "60"]) as container:
        listed = subprocess.run(
            [lsns, "--noheadings", "--output", "TYPE,NS", "--task", str(container.pid)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = {kind: int(inode) for kind, inode in map(str.split, listed.stdout.splitlines())}
        assert found.items() >= namespaces_of(container.pid).items()


@ISOLATED
def test_the_command_unshare_gives_the_same_surroundings():
    user = ["--map-root-user"] if "user" in kinds_for_us() else []
    words = [tool("unshare"), "--fork", "--pid", "--mount-proc", "--uts", "--ipc", "--net", *user, sys.executable, "-c"]
    code = "from minilib.classic.container import look_around; import json; print(json.dumps(vars(look_around())))"
    done = subprocess.run([*words, code], env=child_environment(), capture_output=True, text=True, timeout=60)
    theirs, ours = json.loads(done.stdout), json.loads(json.dumps(vars(run_in_container(look_around).value)))
    assert {name: ours[name] for name in ("pid", "processes", "interfaces", "mounts", "user")}.items() <= theirs.items()


@ISOLATED
def test_the_first_process_is_deaf_to_signals_from_inside():
    """The trap of Docker: SIGTERM does not end a number 1 that has no handler for it."""
    assert run_in_container(work.terminate_itself).value == "still here"


@ISOLATED
def test_with_the_first_process_all_others_end():
    with Container(work.hang_with_a_child) as container:
        first = psutil.Process(container.pid)
        while not (others := first.children(recursive=True)):
            pass
        container.kill()
        assert container.wait().status == -9
        assert not any(process.is_running() for process in [first, *others])


@ISOLATED
def test_a_container_within_a_container_is_number_one_again():
    def outer():
        inner = run_in_container(look_around, hostname="inner")
        return look_around(), inner.value

    outside, inside = run_in_container(outer, hostname="outer").value
    assert (outside.hostname, inside.hostname) == ("outer", "inner")
    assert outside.pid == inside.pid == 1 and inside.processes == (1,)
    assert outside.namespaces["pid"] not in (inside.namespaces["pid"], namespaces_of("self")["pid"])


@ISOLATED
def test_a_filter_that_refuses_unshare_is_named():
    """As Docker's default: the filter answers EPERM."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the filter is written for x86_64 and aarch64")
    done = subprocess.run(
        [sys.executable, "-c", _SECCOMP + SURVEY], env=child_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for part in ("namespaces", "overlay"):
        assert os.strerror(errno.EPERM) in found[part] and "seccomp" in found[part]


@ISOLATED
def test_a_used_up_number_of_namespaces_is_named():
    """The number is one of a user namespace, so it can be set in one without touching the host's."""
    words = [tool("unshare"), "--user", "--map-root-user", "sh", "-c"]
    found = surveyed(*words, 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$@"', "sh")
    assert os.strerror(errno.ENOSPC) in found["namespaces"] and "max_*_namespaces" in found["namespaces"]


def test_where_there_is_no_linux_each_part_says_so(monkeypatch):
    """A kernel without unshare."""
    from minilib.classic.container import CannotContain, namespaces, syscalls

    def missing(flags):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(syscalls, "unshare", missing)
    with pytest.raises(CannotContain, match="Function not implemented") as caught:
        namespaces.new_namespaces(["pid"])
    assert caught.value.part == "namespaces" and caught.value.remedy
