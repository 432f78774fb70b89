"""A server of models in a process of its own, which stands still while it is not asked."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Sequence

from tools.bench.peers.process import WorkerFailed
from tools.bench.sse_client import HOST
from tools.bench.still_process import StillProcess


class ServerProcess(StillProcess):
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
        filled = [part.replace("{port}", str(self.port)) for part in command]
        super().__init__(filled, environment, stdin=subprocess.DEVNULL, stdout=None)
        try:
            self._await(ready, timeout)
            self.pause()
        except BaseException:
            self.close()
            raise

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

    def _await(self, path: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                if self.get(path)[0] == 200:
                    return
            except OSError:
                pass
            if self._process.poll() is not None:
                raise WorkerFailed(self._end())
            if time.monotonic() > deadline:
                raise WorkerFailed(f"not ready within {timeout:g} s")
            time.sleep(0.2)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
