"""Limits: how much of its machine a group of processes may take, and what the kernel counts when it asks for more.

    memory   bytes; who asks for more is killed (SIGKILL), not refused: the kernel promised memory before it was touched
    pids     processes and threads; one more is refused: fork fails with EAGAIN
    cpus     processor time for each second; who has used it waits for the next period

A `Cgroup` is a folder: writing a file in it sets a limit, reading one gives a count. Versions 1 and 2 name files
differently; hierarchies.py finds which are here.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst, pids.rst; scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import errno
import math
import numbers
import os
import signal
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minilib.classic.container.errors import CannotContain, InvalidLimit
from minilib.classic.container.hierarchies import Hierarchy, find_hierarchy

PERIOD = 100_000  # microseconds in which a quota of processor time is used up; the kernel's default
MOST = 2**63 - 1  # to which the kernel counts
_ROOT = "Become root; or, with version 2 of cgroups, run this in `systemd-run --user --scope -p Delegate=yes`"
_REMEDIES = {errno.EROFS: "Cgroups are mounted read-only, as in Docker: start it with `--privileged --cgroupns=host`"}
_WITH_SWAP = ("memory.memsw.limit_in_bytes", "memory.swap.max")  # missing where swap is not counted
_INSIDE = "processes"  # version 2: the group in the group, where the processes are
_CONTROLLERS = {"memory": ("memory",), "pids": ("pids",), "cpus": ("cpu", "cpuacct")}
_PATIENCE = 10.0  # seconds until killed processes are gone


@dataclass(frozen=True)
class ContainerLimits:
    """What a container may take at most. None leaves it as much as we have.

    Args:
        memory: bytes, at least a page of 4,096.
        pids: processes and threads at a time, its first one among them, so at least 1.
        cpus: processors' worth of time, at least 0.01: 0.5 is 50 ms in each 100 ms.

    Raises:
        InvalidLimit: if one of them is something else.
    """

    memory: int | None = None
    pids: int | None = None
    cpus: float | None = None

    def __post_init__(self) -> None:
        for name, value, least, unit in (("memory", self.memory, 4096, "bytes"), ("pids", self.pids, 1, "processes")):
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if value is not None and not (whole and least <= value <= MOST):
                raise InvalidLimit(f"{name} must be a whole number of {unit}, at least {least:,}, below 2**63, got "
                                   f"{value!r}")  # fmt: skip
        real = isinstance(self.cpus, numbers.Real) and not isinstance(self.cpus, bool)
        if self.cpus is not None and not (real and self.cpus >= 0.01 and math.isfinite(self.cpus)):
            raise InvalidLimit(f"cpus must be a number of processors, at least 0.01, got {self.cpus!r}")


@dataclass(frozen=True)
class Counted:
    """What the kernel has counted in a cgroup; None where that limit was not asked for, or the kernel does not say.

    Attributes:
        oom_kills: processes killed because the memory limit left no room.
        peak_memory: most bytes that it had at a time.
        forks_refused: processes and threads refused by the limit of pids.
        periods: periods of 100 ms in which it ran under a quota.
        periods_throttled: of these, periods in which it used up the quota and had to wait.
        cpu_seconds: processor time that it used.
    """

    oom_kills: int | None = None
    peak_memory: int | None = None
    forks_refused: int | None = None
    periods: int | None = None
    periods_throttled: int | None = None
    cpu_seconds: float | None = None


class Cgroup:
    """A group of processes under limits, as a context manager; at its end whoever is in it is killed and it is removed.

    Args:
        limits: the limits; a controller without one is left alone, and with none at all there is no group.

    Attributes:
        folders: folder of the group for each controller. In version 2 they are one.
        doors: file to which a process writes "0" when it enters, for one controller of each hierarchy.

    Raises:
        CannotContain: if the kernel does not let us make the group or set a limit; nothing is left behind.
    """

    def __init__(self, limits: ContainerLimits) -> None:
        self.folders: dict[str, Path] = {}
        self.doors: dict[str, Path] = {}
        self._hierarchies: dict[str, Hierarchy] = {}
        wanted = [name for part, names in _CONTROLLERS.items() if getattr(limits, part) is not None for name in names]
        name = f"container-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            for controller in wanted:
                if controller != "cpuacct" or self._hierarchies["cpu"].version == 1:  # in version 2, cpu counts as well
                    self._add(controller, name)
                    self._set(controller, limits)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def counted(self) -> Counted:
        """What the kernel has counted so far."""
        cpu, pids = self._read("cpu", "cpu.stat"), self._read("pids", "pids.events")
        # Before Linux 6.11 a refusal counts where the process is, since then where the limit is.
        below = self._read("pids", f"{_INSIDE}/pids.events").get("max", 0)
        memory = self._read("memory", "memory.events") or self._read("memory", "memory.oom_control")
        peak = self._read("memory", "memory.peak") or self._read("memory", "memory.max_usage_in_bytes")
        used = self._read("cpuacct", "cpuacct.usage").get("", cpu.get("usage_usec", 0) * 1000)
        return Counted(
            memory.get("oom_kill"),
            peak.get(""),
            pids["max"] + below if pids else None,
            cpu.get("nr_periods"),
            cpu.get("nr_throttled"),
            used / 1e9 if cpu else None,
        )

    def remove(self) -> None:
        """Kill all who are in the group or below it, and remove it. What is gone already is no error.

        Raises:
            TimeoutError: if killed processes do not end, for instance in an uninterruptible wait on a disk.
        """
        remove_groups(self.folders.values())

    def _add(self, controller: str, name: str) -> None:
        found = self._hierarchies[controller] = find_hierarchy(controller)
        folder = self.folders[controller] = found.parent / name
        door = folder if found.version == 1 else folder / _INSIDE
        try:
            folder.mkdir(exist_ok=True)
            if found.version == 2:
                # Processes enter a group below, so that this one can hand its controllers down to containers inside.
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
                door.mkdir(exist_ok=True)
        except OSError as error:
            reason = f"no group can be made in {found.parent}: {error.strerror}"
            raise CannotContain(controller, reason, _REMEDIES.get(error.errno, _ROOT)) from error
        if door / "cgroup.procs" not in self.doors.values():
            self.doors[controller] = door / "cgroup.procs"

    def _set(self, controller: str, limits: ContainerLimits) -> None:
        for name, value in _settings(self._hierarchies[controller].version, limits)[controller].items():
            path = self.folders[controller] / name
            if path.exists() or name not in _WITH_SWAP:
                try:
                    path.write_text(str(value))
                except OSError as error:
                    reason = f"the kernel does not take {value} in {name}: {error.strerror}"
                    raise CannotContain(controller, reason, _REMEDIES.get(error.errno, _ROOT)) from error

    def _read(self, controller: str, name: str) -> dict[str, int]:
        """A file of counts by name; a file that is one number by the name ""."""
        path = self.folders.get(controller, Path("/none")) / name
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return {line[0] if len(line) == 2 else "": int(line[-1]) for line in lines}


def enter_group(controller: str, door: int) -> None:
    """Move this process into a group; its children will be born there.

    Args:
        controller: what the group limits.
        door: the group's cgroup.procs, open to write.

    Raises:
        CannotContain: if the kernel refuses.
    """
    try:
        os.write(door, b"0")
    except OSError as error:
        reason = f"a process cannot enter its group: {error.strerror}"
        raise CannotContain(controller, reason, _REMEDIES.get(error.errno, _ROOT)) from error


def remove_groups(folders: Iterable[Path]) -> None:
    """Kill all who are in these groups or below them, and remove the groups; see `Cgroup.remove`."""
    end = time.monotonic() + _PATIENCE
    for top in dict.fromkeys(folders):
        while top.exists():
            for folder in (*sorted(top.rglob("*/"), reverse=True), top):
                _empty(folder)
            if time.monotonic() > end:
                raise TimeoutError(f"the processes in {top.name} were killed {_PATIENCE:g} s ago, and are not gone")
            time.sleep(0.001)


def _settings(version: int, limits: ContainerLimits) -> dict[str, dict[str, int | str]]:
    """For each controller: files of a group, and what to write into them, in this order."""
    memory, quota = limits.memory, round((limits.cpus or 0) * PERIOD)
    if version == 1:
        return {
            "memory": {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory},  # with swap: no more
            "pids": {"pids.max": limits.pids},
            "cpu": {"cpu.cfs_period_us": PERIOD, "cpu.cfs_quota_us": quota},
            "cpuacct": {},
        }
    return {
        "memory": {"memory.max": memory, "memory.swap.max": 0},
        "pids": {"pids.max": limits.pids},
        "cpu": {"cpu.max": f"{quota} {PERIOD}"},
    }


def _empty(folder: Path) -> None:
    """Kill who is in a group, and remove it if nobody is left."""
    with suppress(OSError):  # it is gone, or its processes are still ending
        for pid in map(int, (folder / "cgroup.procs").read_text().split()):
            if pid:  # 0 is a process that this PID namespace does not show
                os.kill(pid, signal.SIGKILL)
        folder.rmdir()
