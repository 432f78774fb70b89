"""Files that a reader sees whole, the old content or the new one, and files in memory that outlast their process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file beside `path`, and put it in its place once the body has ended without an error.

    Several processes may do so at once: each writes a file of its own, and the last one to end stays.

    Args:
        path: in a folder that exists.

    Yields:
        Where to write. It is removed if the body raises, and `path` is as before.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def mapped_anew(path: Path, size: int) -> mmap.mmap:
    """Map a new file of zeros at `path`. Whoever has the old one mapped keeps it.

    The zeros are written: in a file without room for what is stored into its mapping, such as of a full /dev/shm, the
    store would end the process (SIGBUS).

    Args:
        path: in a folder that exists.
        size: bytes, 1 or more.

    Raises:
        OSError: if there is no room; then there is no file.
    """
    path.unlink(missing_ok=True)
    with path.open("x+b") as file:
        try:
            extend_with_zeros(file, size)
            return mmap.mmap(file.fileno(), size)
        except BaseException:
            path.unlink()
            raise


def extend_with_zeros(file: BinaryIO, size: int) -> None:
    """Let a file that is shorter have so many bytes, the new ones zeros for which there is room.

    Raises:
        OSError: if there is none; the message says how much is needed.
    """
    missing = size - file.seek(0, os.SEEK_END)
    try:
        file.write(bytes(max(0, missing)))
        file.flush()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {missing} bytes more are needed", file.name) from error
