"""A copy-on-write root: what a container takes for the disk is a stack of folders, of which it writes the top one.

    merged   what the container sees                    /etc/name   /var/log   …
    upper    what it has changed, and nothing else      a file written; a device 0:0 (a whiteout) where one was deleted
    lower    the layers of its image, never written     shared by all containers

A file is copied up whole before its first byte is written, so a small change of a large file costs the large file. The
layers of images, found by their content: image_layers.py; trees that share blocks instead: content_store.py.

Source: Linux, Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minilib.classic.container import syscalls
from minilib.classic.container.errors import CannotContain
from minilib.classic.container.namespaces import in_user_namespace, mount_proc

_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")  # a folder that hides the one below; by root, by a user
_NO_PLACE = "The folder must be on ext4, xfs, btrfs or tmpfs, not itself on an overlay (in Docker: on a volume)"
_REMEDIES = {
    errno.ENODEV: "The kernel's module is not loaded: `modprobe overlay` as root",
    errno.ELOOP: "A layer is given twice, or the folder of the changes lies in one: give another `folder`",
    errno.EPERM: "Before Linux 5.11 only root may mount one: become root",
}


@dataclass(frozen=True)
class RootChanges:
    """What a container has changed of its root.

    Attributes:
        written: paths of files made or changed.
        deleted: paths of files and folders that the layers have, and the container no longer sees.
        bytes_in_upper: size of the files written: of a file that was changed all of it, not the change alone.
    """

    written: tuple[str, ...]
    deleted: tuple[str, ...]
    bytes_in_upper: int


def lay_out(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Make a tree of files, a layer for a root.

    Args:
        folder: where; it is made.
        files: content by path from there.

    Returns:
        The folder.

    Raises:
        ValueError: if a path is not below the folder; nothing was made.
    """
    for name in files:
        if folder.resolve() not in (folder / name).resolve().parents:
            raise ValueError(f"{name!r} leads out of the layer; give paths from its root on, as 'etc/name'")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class OverlayRoot:
    """A root for one container, over layers that are shared. A context manager: at its end the changes are deleted.

    Args:
        *layers: folders, the lowest first. They are never written.
        folder: where a temporary folder for the changes is made; the system's place for those if left out.
            Without attributes of users there (tmpfs before Linux 6.6) a container of a user's, not of root's, gets an
            error when it makes a folder anew that it has deleted.

    Attributes:
        upper: the folder of the changes.

    Raises:
        ValueError: if there is no layer.
        NotADirectoryError: if a layer is no folder.
    """

    def __init__(self, *layers: Path, folder: Path | None = None) -> None:
        if not layers:
            raise ValueError("a root needs at least one layer")
        for layer in layers:
            if not Path(layer).is_dir():
                raise NotADirectoryError(f"the layer {layer} is no folder")
        self._in_use = False
        self.layers = tuple(Path(layer).resolve() for layer in layers)
        self._folder = Path(tempfile.mkdtemp(prefix="container-", dir=folder)).resolve()
        self.upper, self._work, self._merged, self._points = (
            self._folder / name for name in ("upper", "work", "merged", "mount-points")
        )
        for path in (self.upper, self._work, self._merged, self._points / "proc"):
            path.mkdir(parents=True)

    def __enter__(self) -> OverlayRoot:
        return self

    def __exit__(self, *exception: object) -> None:
        for folder, names, _ in os.walk(self._folder):
            for path in (Path(folder, name) for name in names):
                if not path.is_symlink():
                    path.chmod(0o700)  # the kernel makes one that only root can look into
        shutil.rmtree(self._folder)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep it for one container at a time, as the kernel demands.

        Raises:
            ValueError: if another one uses it, or its changes have been deleted.
        """
        self._check_there()
        if self._in_use:
            raise ValueError("another container uses this root; give each one a root of its own over the same layers")
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False

    def enter(self) -> None:
        """Make it the root of this process's mount namespace. Nothing but it and its /proc stays mounted there.

        Raises:
            CannotContain: if the kernel refuses.
        """
        # The mount point of /proc comes with a layer of its own, or the container would seem to have made it.
        lower = ":".join(map(_escaped, (*reversed(self.layers), self._points)))
        options = f"lowerdir={lower},upperdir={_escaped(self.upper)},workdir={_escaped(self._work)}"
        try:
            syscalls.mount("overlay", str(self._merged), "overlay", 0, options + ",userxattr" * in_user_namespace())
            mount_proc(self._merged / "proc")  # a user may mount one only while another is in sight
            syscalls.pivot_root(str(self._merged))
        except OSError as error:
            reason = f"no overlay on {self._folder.parent}: {error.strerror}"
            raise CannotContain("overlay", reason, _REMEDIES.get(error.errno, _NO_PLACE)) from error

    def changes(self) -> RootChanges:
        """What has been changed so far, told from the upper folder and the layers alone.

        Raises:
            ValueError: if the changes have been deleted.
        """
        self._check_there()
        written, deleted, size = [], [], 0
        for path in sorted(self.upper.rglob("*")):
            name, status = path.relative_to(self.upper).as_posix(), path.lstat()
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                deleted.append(name)
            elif not stat.S_ISDIR(status.st_mode):
                written.append(name)
                size += status.st_size
            if not stat.S_ISDIR(status.st_mode) or _is_opaque(path):
                hidden = {below.relative_to(layer) for layer in self.layers for below in (layer / name).rglob("*")}
                deleted += [below.as_posix() for below in hidden if not os.path.lexists(self.upper / below)]
        return RootChanges(tuple(written), tuple(sorted(deleted)), size)

    def _check_there(self) -> None:
        if not self._folder.is_dir():
            raise ValueError("this root's changes were deleted at the end of its body; use it inside, or make another")


def _escaped(path: Path) -> str:
    """A path as mount takes it among its options, where colons and commas part them."""
    return re.sub(r"([\\:,])", r"\\\1", str(path))


def _is_opaque(folder: Path) -> bool:
    """Whether a folder was deleted and made anew, so that it hides what the layers have at its place."""
    for name in _OPAQUE:
        with suppress(OSError):  # it has no such mark, or this user may not see it
            if os.getxattr(folder, name) == b"y":
                return True
    return False
