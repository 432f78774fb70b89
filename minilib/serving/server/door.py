"""What every request passes first: the API key is compared, the replica named, the response counted and recorded."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minilib.serving.server.errors import AUTHENTICATION, ApiError
from minilib.serving.server.metrics import ServerMetrics
from minilib.serving.server.records import OpenRecords, note_error

OPEN = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})  # for probes, scrapers and readers of the document
UNRECORDED = OPEN | {"/status"}  # what looks at a server is none of its work


class Door:
    """The outermost ASGI application.

    Args:
        app: what is behind it.
        metrics: of the server.
        records: gets one of each request but those of probes and scrapers.
        paths: those that are counted by name; all others are one.
        name: of this replica; None to send no header.
        api_key: what a client must send as a bearer token; None for no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        records: OpenRecords,
        paths: frozenset[str],
        name: str | None,
        api_key: str | None,
    ) -> None:
        self._app, self._metrics, self._records, self._paths = app, metrics, records, paths
        self._headers = [(b"x-replica", name.encode())] if name else []
        self._key = _digest(api_key.encode()) if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        if scope["method"] == "HEAD":  # as GET; uvicorn, which has the scope itself, sends no body
            scope = scope | {"method": "GET"}
        record = None if path in UNRECORDED else self._records.begin(scope, path)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
                self._metrics.http.labels(path, str(message["status"])).inc()
                if record is not None:
                    record.status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, sending)
        finally:
            if record is not None:
                self._records.end(record)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key and scope["path"] not in OPEN and not self._knows(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            message = "the API key is wrong or missing"
            note_error(scope, "invalid_api_key")
            await respond(ApiError(401, message, "invalid_api_key", kind=AUTHENTICATION, headers=headers), send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._key)


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing does not tell the length of the right one."""
    return hashlib.sha256(key).digest()


async def respond(error: ApiError, send: Send) -> None:
    """Send an error as a whole response."""
    body = error.body
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
