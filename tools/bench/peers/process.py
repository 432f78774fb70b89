"""A worker in a process of its own, which stands still while it is not asked."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Sequence

from tools.bench.still_process import StillProcess, without_paths


class WorkerFailed(RuntimeError):
    """The worker ended, said nothing in time, or reports an error."""


class Unable(RuntimeError):
    """The engine does not offer what was asked; the worker goes on."""


class Worker(StillProcess):
    """An engine behind a pipe, see worker.py; a context manager that leaves no process behind.

    Args:
        command: what to start.
        timeout: seconds for the model to be loaded.
        environment: variables beside this process's.

    Raises:
        WorkerFailed: if no model is loaded.
    """

    def __init__(self, command: Sequence[str], timeout: float, environment: dict[str, str] | None = None) -> None:
        super().__init__(command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._read = b""
        try:
            self.loaded = self._answer(timeout)
            self.pause()
        except BaseException:
            self.close()
            raise

    def ask(self, requests: Sequence, timeout: float) -> dict:
        """Serve requests; the worker runs for so long and is stopped before and after, so that it cannot spin.

        Args:
            requests: as `serve` of worker.py takes them.
            timeout: seconds after which the worker is given up.

        Raises:
            WorkerFailed: if there is no answer; no further question will have one.
            Unable: if the engine does not offer it.
        """
        self.resume()
        try:
            self._process.stdin.write(json.dumps(requests).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._end()) from None
        found = self._answer(timeout)
        self.pause()
        if "unable" in found:
            raise Unable(found["unable"])
        return found

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
