"""A process that stands still while it is not asked, so that it cannot spin while another one is measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, Self


class StillProcess:
    """A program with its threads and children; a context manager that leaves none of them behind.

    Args:
        command: what to start.
        environment: variables beside this process's.
        pipes: standard input and output, as of `subprocess.Popen`; None goes with standard error to a file.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None, **pipes: Any) -> None:
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        noisy = {name: self._noise if pipe is None else pipe for name, pipe in pipes.items()}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            process_group=0,  # its threads and children stop and end with it; Ctrl-C reaches this process alone
            stderr=self._noise,
            **noisy,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pause(self) -> None:
        """Stop it where it is."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and all that it started, in whatever state they are."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._noise):
            try:
                if stream:
                    stream.close()
            except BrokenPipeError:  # what was not written any more
                continue

    def _end(self) -> str:
        """How the process ended and the last that it said; waits for its end."""
        code = self._process.wait()
        self._noise.seek(0)
        return f"ended with {code}: {last_line(self._noise.read().decode(errors='replace'))}"

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # it has ended; macOS says so by the second
            return


def last_line(text: str) -> str:
    """The last line that is not empty, for people: without paths of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return without_paths(lines[-1]) if lines else "no message"


def without_paths(text: str) -> str:
    """The text with folders cut off from absolute paths, at most 300 characters."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "…/", text)[:300]
