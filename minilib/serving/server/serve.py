"""A server while it runs: it listens, says when it is ready, drains when asked to end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn

from minilib.serving.asynchronous.errors import EngineStopped
from minilib.serving.server.app import build_app
from minilib.serving.server.connections import connection_type
from minilib.serving.server.service import Service

CLOSE_SECONDS = 5  # after which connections are cut that have not ended by themselves when all is computed

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which ends when its engine has drained.

    The first signal stops new requests, and the server goes on answering, that it is not ready among the rest, until
    those it has are finished; the second one ends at once.

    Args:
        service: what is served; its engine is shut down at the end.
        host: address to listen on.
        port: 0 for a free one.
        api_key: what clients must send; None for no key.
        drain_seconds: after which requests that are not finished are aborted.
        start: starts the engine, while the server says that it is not ready; None if it has started.

    Attributes:
        failure: what `start` raised, which ends the server.
    """

    def __init__(
        self,
        service: Service,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        drain_seconds: float = 60,
        start: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        limits = service.limits
        config = uvicorn.Config(
            build_app(service, api_key),
            host=host,
            port=port,
            http=connection_type(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        super().__init__(config)
        self.service, self._drain_seconds, self._start = service, drain_seconds, start
        self.failure: BaseException | None = None
        self._starting: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str:
        """The URL of the server, once it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen until a signal or `stop` ends it, then shut the engine down."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            for task in filter(None, (self._starting, self._drain)):
                task.cancel()
                await asyncio.wait([task])
            await self.service.engine.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then start the engine."""
        await super().startup(sockets)
        if not self.should_exit:
            self._starting = asyncio.ensure_future(self._start_engine())

    async def _start_engine(self) -> None:
        try:
            if self._start is not None:
                await self._start()
            self._announce(await asyncio.to_thread(lambda: self.service.max_length))  # the first time it takes long
        except EngineStopped as error:
            if self._drain is None:
                self._fail(error)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure, self.should_exit = error, True

    def _announce(self, max_length: int) -> None:
        model = self.service.model
        body = json.dumps({"model": model, "prompt": "def add(a, b):\n", "max_tokens": 16, "temperature": 0})
        logger.info("%s serves %s, %d tokens a request at most; try", self.address, model, max_length)
        logger.info("curl %s/v1/completions -H 'Content-Type: application/json' -d '%s'", self.address, body)

    def stop(self) -> None:
        """Drain and end; a second call ends at once. Called in any thread."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._stop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came; unlike uvicorn's, the process ends by itself and not by the signal."""
        logger.info("%s: taking no more requests", signal.Signals(sig).name)
        self.stop()

    def _stop(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drained())
        else:
            self.should_exit = self.force_exit = True

    async def _drained(self) -> None:
        try:
            await self.service.engine.drain(self._drain_seconds)
        finally:
            self.should_exit = True
