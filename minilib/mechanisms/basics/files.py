"""Files that a reader sees whole: the old content or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
