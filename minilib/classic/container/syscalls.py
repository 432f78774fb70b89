"""The system calls that a container is made of, and that Python 3.11 has no function for.

Each is libc's function of the same name, and raises OSError with the number that libc left in errno.

Source: man 2 unshare, mount, umount, pivot_root, prctl; the numbers are from <linux/sched.h>, <sys/mount.h>.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x4_0000
_MNT_DETACH, _PR_SET_PDEATHSIG = 2, 1
_SYS_PIVOT_ROOT = {"x86_64": 155}  # every architecture that came later has 41


def unshare(flags: int) -> None:
    """Leave the namespaces that the CLONE_NEW… flags name, for new ones. Of NEWPID children are the first members."""
    _call("unshare", flags)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Attach a filesystem of this kind at the target, in the mount namespace of this process."""
    texts = (source.encode(), target.encode(), kind.encode() or None)
    _call("mount", *texts, ctypes.c_ulong(flags), options.encode() or None)


def pivot_root(folder: str) -> None:
    """Make a mounted folder the root of this mount namespace, and let go of all that was mounted before."""
    os.chdir(folder)
    number = _SYS_PIVOT_ROOT.get(platform.machine(), 41)
    _call("syscall", ctypes.c_long(number), b".", b".")  # the old root lies over the new one now …
    _call("umount2", b".", _MNT_DETACH)  # … until this takes it off
    os.chdir("/")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it is gone."""
    _call("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def _call(name: str, *args: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
