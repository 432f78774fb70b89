"""Where this machine keeps its cgroups: a folder a group, of version 1 or 2, found rather than assumed.

    version 1   a tree of folders for each controller         /sys/fs/cgroup/memory/…, /sys/fs/cgroup/pids/…
    version 2   one tree; a folder says which controllers     /sys/fs/cgroup/…/cgroup.subtree_control
                the folders below it have

A machine may have both, each controller in one of them. In version 1 a new group goes below our own. In version 2 a
group that has processes hands no controller down, and our own has us: so the new group goes below the nearest ancestor
that hands the controllers down already. Nothing that is there is changed.

Source: Linux, Documentation/admin-guide/cgroup-v1/cgroups.rst and cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minilib.classic.container.errors import CannotContain

_ABSENT = "It needs Linux with this controller, its cgroups mounted at /sys/fs/cgroup"
_NOT_HANDED_DOWN = (
    "As a user, run this in `systemd-run --user --scope -p Delegate=yes`; as root write `+memory +pids +cpu` to "
    "/sys/fs/cgroup/cgroup.subtree_control; in Docker start with `--privileged --cgroupns=host`"
)


@dataclass(frozen=True)
class Hierarchy:
    """One tree of groups, and where in it a new one may be made.

    Attributes:
        version: 1 or 2.
        parent: the folder in which to make it.
    """

    version: int
    parent: Path


def find_hierarchy(controller: str, proc: Path = Path("/proc/self")) -> Hierarchy:
    """Where a group with this controller may be made.

    Args:
        controller: "memory", "pids", "cpu" or "cpuacct".
        proc: the folder in /proc of the process below whose group it shall be.

    Raises:
        CannotContain: if there is no such place.
    """
    version, own, top = _own_group(controller, proc)
    if version == 1:
        return Hierarchy(1, own)
    above = [own, *own.parents]
    for folder in above[: above.index(top) + 1]:
        handed_down = folder / "cgroup.subtree_control"
        if handed_down.exists() and controller in handed_down.read_text().split():
            return Hierarchy(2, folder)
    raise CannotContain(controller, "no cgroup from ours up hands this controller down", _NOT_HANDED_DOWN)


def _own_group(controller: str, proc: Path) -> tuple[int, Path, Path]:
    """Version of the controller's hierarchy, the folder of the process's group, and the highest folder seen here."""
    if not (proc / "cgroup").exists():
        raise CannotContain(controller, "there is no /proc/self/cgroup", _ABSENT)
    groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    ones = [path for _, controllers, path in groups if controller in controllers.split(",")]
    twos = [path for number, _, path in groups if number == "0"]
    for version, path in [(1, path) for path in ones] or [(2, path) for path in twos]:
        for root, top in _mounts(version, controller, (proc / "mountinfo").read_text().splitlines()):
            if PurePosixPath(path).is_relative_to(root):
                return version, top / PurePosixPath(path).relative_to(root), top
    raise CannotContain(controller, "our own cgroup is in no cgroup filesystem that is mounted here", _ABSENT)


def _mounts(version: int, controller: str, mountinfo: Iterable[str]) -> Iterable[tuple[str, Path]]:
    """Of each mounted hierarchy with this controller: which group is its root here, and the folder it is mounted on."""
    for line in mountinfo:
        before, after = line.split(" - ")
        kind, _, options = after.split(" ", 2)
        if (kind == "cgroup2" and version == 2) or (kind == "cgroup" and controller in options.split(",")):
            root, folder = before.split()[3:5]
            yield root, Path(folder)
