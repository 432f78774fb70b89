"""A worker in a process of its own, which stands still while it is not asked."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Self


class WorkerFailed(RuntimeError):
    """The worker ended, said nothing in time, or reports an error."""


class Unable(RuntimeError):
    """The engine does not offer what was asked; the worker goes on."""


class Worker:
    """An engine behind a pipe, see worker.py; a context manager that leaves no process behind.

    Args:
        command: what to start.
        timeout: seconds for the model to be loaded.
        environment: variables beside this process's.

    Raises:
        WorkerFailed: if no model is loaded.
    """

    def __init__(self, command: Sequence[str], timeout: float, environment: dict[str, str] | None = None) -> None:
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            env={**os.environ, **(environment or {})},
            process_group=0,  # its threads and children stop and end with it; Ctrl-C reaches this process alone
        )
        self._read = b""
        try:
            self.loaded = self._answer(timeout)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, requests: Sequence, timeout: float) -> dict:
        """Serve requests; the worker runs for so long and is stopped before and after, so that it cannot spin.

        Args:
            requests: as `serve` of worker.py takes them.
            timeout: seconds after which the worker is given up.

        Raises:
            WorkerFailed: if there is no answer; no further question will have one.
            Unable: if the engine does not offer it.
        """
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(requests).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._end()) from None
        found = self._answer(timeout)
        self._signal(signal.SIGSTOP)
        if "unable" in found:
            raise Unable(found["unable"])
        return found

    def close(self) -> None:
        """End the process and all that it started, in whatever state they are."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._noise):
            try:
                stream.close()
            except BrokenPipeError:  # what was not written any more
                continue

    def _answer(self, timeout: float) -> dict:
        out, deadline = self._process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._read:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerFailed(f"no answer within {timeout:g} s")
            more = os.read(out, 1 << 16)
            if not more:
                raise WorkerFailed(self._end())
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise WorkerFailed(without_paths(found["error"]))
        return found

    def _end(self) -> str:
        """How the process ended and the last that it said."""
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
