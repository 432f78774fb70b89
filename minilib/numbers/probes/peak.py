"""How far a function makes this process's memory rise, by the operating system's own high-water mark."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class NoHighWaterMark(RuntimeError):
    """This platform does not tell, or does not let its high-water mark be reset; Linux does both."""


def peak_memory(fn: Callable[[], object]) -> int:
    """Bytes by which resident memory rose above where it stood while `fn()` ran; its result is dropped.

    Memory that the process freed earlier and kept for itself does not rise again: results of a few MB are rough.

    Raises:
        NoHighWaterMark: where /proc/self/clear_refs cannot be written.
    """
    gc.collect()
    try:
        _RESET.write_text("5")
    except OSError as error:
        raise NoHighWaterMark(f"the peak of resident memory cannot be reset here: {error}") from error
    before = _bytes("VmRSS")
    fn()
    return max(0, _bytes("VmHWM") - before)


def _bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1])
