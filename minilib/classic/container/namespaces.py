"""Namespaces: what a process takes for its machine.

    pid    which processes there are; the first one inside is number 1, and takes all others along when it ends
    uts    the host's name
    mnt    what is mounted where
    ipc    shared memory and message queues
    net    interfaces, addresses, ports; a new one has `lo`, and that is down
    user   who is root; whoever is not root may have the others inside one of these, and is root there alone

A namespace is an inode: two processes that see the same inode at /proc/PID/ns/KIND share what that kind hides.

Source: man 7 namespaces, man 7 user_namespaces.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minilib.classic.container import syscalls
from minilib.classic.container.errors import CannotContain

KINDS = {
    "user": syscalls.CLONE_NEWUSER,
    "pid": syscalls.CLONE_NEWPID,
    "uts": syscalls.CLONE_NEWUTS,
    "mnt": syscalls.CLONE_NEWNS,
    "ipc": syscalls.CLONE_NEWIPC,
    "net": syscalls.CLONE_NEWNET,
}
_CAP_SYS_ADMIN = 21
_REMEDIES = {
    errno.EPERM: "A seccomp filter (Docker's default), AppArmor or a sysctl forbids it: in Docker start with "
    "`--cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined`, on Ubuntu set "
    "kernel.apparmor_restrict_unprivileged_userns=0, or become root",
    errno.ENOSPC: "The most namespaces that user.max_*_namespaces allows are there: raise the sysctl",
    errno.EINVAL: "The kernel was built without one of these kinds",
}


@dataclass(frozen=True)
class Surroundings:
    """What a process sees of its machine.

    Attributes:
        pid: its own number.
        processes: numbers of all processes in /proc.
        hostname: the host's name.
        interfaces: names of the network interfaces.
        mounts: folders on which something is mounted.
        user: its user's number.
        namespaces: inode of its namespace of each kind.
    """

    pid: int
    processes: tuple[int, ...]
    hostname: str
    interfaces: tuple[str, ...]
    mounts: tuple[str, ...]
    user: int
    namespaces: dict[str, int]


def look_around() -> Surroundings:
    """What this process sees: the same question inside a container and outside.

    Raises:
        FileNotFoundError: where no /proc is mounted.
    """
    proc = Path("/proc")
    mounts = [line.split()[4] for line in (proc / "self/mountinfo").read_text().splitlines()]
    return Surroundings(
        pid=os.getpid(),
        processes=tuple(sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())),
        hostname=socket.gethostname(),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        mounts=tuple(mounts),
        user=os.getuid(),
        namespaces=namespaces_of("self"),
    )


def namespaces_of(pid: int | str) -> dict[str, int]:
    """The inode of a process's namespace of each kind.

    Raises:
        FileNotFoundError: if there is no such process.
    """
    return {kind: Path(f"/proc/{pid}/ns/{kind}").stat().st_ino for kind in KINDS}


def new_namespaces(kinds: Sequence[str]) -> None:
    """Leave this process's namespaces of these kinds for new ones; in a user namespace become its root.

    The next child is number 1 of a new PID namespace; this process stays in the old one.

    Raises:
        CannotContain: if the kernel refuses.
    """
    user, group = os.getuid(), os.getgid()
    try:
        syscalls.unshare(sum(KINDS[kind] for kind in kinds))
        if "user" in kinds:
            Path("/proc/self/setgroups").write_text("deny")  # or a group that takes rights away could be left
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "See man 2 unshare")
        raise CannotContain("namespaces", f"new {', '.join(kinds)}: {error.strerror}", remedy) from error


def kinds_for_us() -> tuple[str, ...]:
    """All kinds that a container gets. The one of users only where this process may not have the others without."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    may_administer = int(lines.get("CapEff", "0"), 16) >> _CAP_SYS_ADMIN & 1
    return tuple(kind for kind in KINDS if kind != "user" or not may_administer)


def in_user_namespace() -> bool:
    """Whether this process's users are a choice of the host's, as in a container that no root has started."""
    return Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]


def own_mounts() -> None:
    """Keep what is mounted from now on in this mount namespace; without this, much of it would show in the host's."""
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)


def mount_proc(folder: Path = Path("/proc")) -> None:
    """Mount a /proc that shows this PID namespace, in a mount namespace of this process's own.

    Args:
        folder: where, if the root is not yet the one that it is for.

    Raises:
        CannotContain: if the kernel refuses.
    """
    try:
        syscalls.mount("proc", str(folder), "proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
    except OSError as error:
        remedy = "Parts of /proc are hidden here, as in Docker: start it with `--security-opt systempaths=unconfined`"
        raise CannotContain("namespaces", f"a /proc of its own: {error.strerror}", remedy) from error
