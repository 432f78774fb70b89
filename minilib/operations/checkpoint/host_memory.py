"""Parts and manifests in the memory of a host: files of a folder such as /dev/shm/…, which outlast a killed process.

Nothing is synced: what is lost with the power is lost with the host. A file has its name once it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from minilib.mechanisms.journaling import TEMPORARY, numbered
from minilib.operations.checkpoint.format.folder import MANIFEST, PART


class HostMemory:
    """The folder of one rank. What a process that was killed has not finished is removed.

    Args:
        folder: made if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{TEMPORARY}"):
            path.unlink()

    @property
    def nbytes(self) -> int:
        """Bytes of parts, finished or not. Also while a save goes on in the background."""
        while True:
            try:
                return sum(path.stat().st_size for path in self.folder.glob(f"{PART}-*"))
            except FileNotFoundError:  # the save has given a listed file its name, or removed it: list again
                continue

    def names(self) -> list[str]:
        """Files that are whole, in order."""
        return sorted(path.name for path in self.folder.iterdir() if not path.name.endswith(TEMPORARY))

    def read(self, name: str, offset: int = 0, size: int = -1) -> bytes:
        """Bytes of a file from an offset on, at most so many; all of them if left out."""
        with (self.folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def begin(self, name: str) -> None:
        """Begin a file, empty and without its name."""
        self._unfinished(name).write_bytes(b"")

    def extend(self, name: str, data: bytes | memoryview) -> None:
        """Put bytes at the end of a file that was begun."""
        with self._unfinished(name).open("ab") as file:
            file.write(data)

    def finish(self, name: str) -> None:
        """Give a file its name."""
        self._unfinished(name).replace(self.folder / name)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """A whole file, or none."""
        self.begin(name)
        self.extend(name, data)
        self.finish(name)

    def keep_only(self, step: int) -> None:
        """Remove what is not of a step, finished or not."""
        self.remove(name for name in self._all_names() if not name.startswith(_beginnings(step)))

    def discard(self, step: int) -> None:
        """Remove what is of a step, finished or not."""
        self.remove(name for name in self._all_names() if name.startswith(_beginnings(step)))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            (self.folder / name).unlink()

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def _all_names(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()]

    def _unfinished(self, name: str) -> Path:
        return self.folder / (name + TEMPORARY)


def _beginnings(step: int) -> tuple[str, ...]:
    return numbered(PART, step), numbered(MANIFEST, step)
