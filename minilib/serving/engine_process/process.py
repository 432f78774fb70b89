"""The process of an engine, seen by the one that started it: what is sent, what is received, and how it ended."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress

from minilib.serving.asynchronous.status import ModelDescription
from minilib.serving.engine_process.messages import Messages, framed, unpacked_error

# A new interpreter that finds what this one finds. It forks nothing that has threads, and runs no main script again.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from minilib.serving.engine_process.engine_loop import serve; sys.exit(serve(*map(int, sys.argv[2:])))"
)
_POLL = 0.005  # seconds between looks at a process that ends
_PATIENCE = 10.0  # seconds that a process may take to be gone after it was killed


class EngineProcess(asyncio.Protocol):
    """One process, from its start to its end.

    Args:
        factory: pickled; makes the engine there.
        receive: called with each message about requests.

    Attributes:
        ready: done when the engine is there; the error that it failed with, if the factory raised.
        lost: done when the process has closed its end: it has ended, or does.
        heard: how often something has been received.
    """

    def __init__(self, factory: bytes, receive: Callable[..., None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[ModelDescription] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.heard = 0
        self._receive, self._factory, self._messages = receive, factory, Messages()
        self._traceback, self._killed_for = "", ""

    async def start(self) -> None:
        """Start it; the engine is there when `ready` is done.

        Raises:
            OSError: if the system starts no process.
        """
        with ExitStack() as undo:
            self._socket, its_end = socket.socketpair()
            self._traces = undo.enter_context(tempfile.TemporaryFile())
            undo.callback(self._socket.close)
            with its_end:
                fds = its_end.fileno(), self._traces.fileno()
                command = [sys.executable, "-c", _CODE, json.dumps(sys.path), *map(str, fds)]
                self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
            undo.callback(self._end_now)
            self._socket.setblocking(False)
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._socket)
            undo.pop_all()
        self.send("factory", self._factory)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, *message: object) -> None:
        """Send a message; nothing if the process has ended."""
        if not self.lost.done():
            self._transport.write(framed(*message))

    async def kill(self, reason: str) -> None:
        """End it at once, for a reason that `cause` will give, but let it write down where it is."""
        self._killed_for = reason
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            await asyncio.sleep(0.1)
            self._process.kill()

    async def close(self, patience: float) -> None:
        """Let it end after the step that runs, and kill it after so many seconds."""
        try:
            if not self.lost.done():
                self._transport.write_eof()
            await self._ended(patience)
        finally:
            self._end_now()
            self._transport.close()
            self._traces.close()
            await asyncio.wait((self.lost,))  # nothing is received of it any more

    async def cause(self) -> tuple[str, str]:
        """What it ended by, once it is lost, and the last traceback; both may be nothing that is known."""
        code = await self._ended(_PATIENCE)
        self._traces.seek(0)
        trace = self._traceback or self._traces.read().decode(errors="replace")
        if self._killed_for:
            return self._killed_for, trace
        if self._traceback:
            return self._traceback.strip().rsplit("\n", 1)[-1], trace
        if code is None:
            return "it closed its socket and went on", trace
        if code >= 0:
            return f"it ended with exit code {code}", trace
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"it was killed by {signal.Signals(-code).name}{hint}", trace

    def _end_now(self) -> None:
        self._process.kill()
        self._process.wait(_PATIENCE)

    async def _ended(self, patience: float) -> int | None:
        """Its exit code, negative for a signal; None if it has not ended after so many seconds."""
        loop = asyncio.get_running_loop()
        limit = loop.time() + patience
        while self._process.poll() is None and loop.time() < limit:
            await asyncio.sleep(_POLL)
        return self._process.returncode

    # What asyncio calls

    def data_received(self, data: bytes) -> None:
        """Messages have come."""
        self.heard += 1
        for message in self._messages.feed(data):
            if message[0] == "step":
                self._receive(*message)
            else:
                self._take(*message)

    def connection_lost(self, error: Exception | None) -> None:
        """The process has closed its end; what it sent before may still lie here if a message to it failed first."""
        with suppress(OSError):
            while data := self._socket.recv(1 << 16):
                self.data_received(data)
        self.lost.set_result(None)

    def _take(self, kind: str, *content) -> None:
        if kind == "ready":
            described, counts = content
            self._receive("step", counts, 0, (), ())
            self.ready.set_result(pickle.loads(described))
        elif kind == "failed":
            if not self.ready.done():
                self.ready.set_exception(unpacked_error(*content))
                self.ready.exception()  # it is no fault if nobody waits any more
        elif kind == "died":
            (self._traceback,) = content
        else:
            self._receive(kind, *content)
