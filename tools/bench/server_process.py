"""A server of models in a process of its own, which stands still while it is not asked."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Self

from tools.bench.peers.process import WorkerFailed, last_line
from tools.bench.sse_client import HOST


class ServerProcess:
    """A program that serves HTTP on a port of this machine; a context manager that leaves no process behind.

    Args:
        command: what to start; "{port}" stands for the port.
        ready: path of a GET that has status 200 once the server can be asked.
        timeout: seconds until then.
        environment: variables beside this process's.

    Raises:
        WorkerFailed: if it is not ready in time, or ends.
    """

    def __init__(
        self, command: Sequence[str], ready: str, timeout: float, environment: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [part.replace("{port}", str(self.port)) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self._noise,
            stderr=self._noise,
            env={**os.environ, **(environment or {})},
            process_group=0,  # its threads and children stop and end with it; Ctrl-C reaches this process alone
        )
        try:
            self._await(ready, timeout)
            self.pause()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pause(self) -> None:
        """Stop it where it is, so that it cannot spin while another one is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def get(self, path: str) -> tuple[int, dict]:
        """Status and JSON of a GET.

        Raises:
            OSError: if there is no answer.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            kind = response.headers.get("content-type", "")
            return response.status, json.loads(body) if kind.startswith("application/json") else {}
        finally:
            connection.close()

    def close(self) -> None:
        """End the process and all that it started, in whatever state they are."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._noise.close()

    def _await(self, path: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                if self.get(path)[0] == 200:
                    return
            except OSError:
                pass
            if self._process.poll() is not None:
                self._noise.seek(0)
                said = last_line(self._noise.read().decode(errors="replace"))
                raise WorkerFailed(f"ended with {self._process.returncode}: {said}")
            if time.monotonic() > deadline:
                raise WorkerFailed(f"not ready within {timeout:g} s")
            time.sleep(0.2)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
