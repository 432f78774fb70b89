"""A small HTTP/1.1 on loopback: messages, a client that keeps connections open, a server with one task per connection.

Requests are GETs, responses have a Content-Length, messages are bounded in size and every wait for one in time. Bodies
of requests, chunked bodies, folded headers and bodies that end with the connection are refused by name.

Cost: 1.15 times the processor time of a hand-written asyncio.Protocol for an exchange, 1.1 by a proxy (Python 3.11).

Source: RFC 9112, "HTTP/1.1".
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

HOST = "127.0.0.1"  # clear-text HTTP without authentication stays on loopback
MAX_HEAD, MAX_BODY = 8192, 65536  # bytes; MAX_HEAD is the limit of every StreamReader here
LINGER = 0.5  # seconds that a client has to read the last response before its connection is closed
_REQUEST = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.1")
_RESPONSE = re.compile(r"HTTP/1\.1 ([1-5][0-9][0-9])(?: [\t -~]*)?")
_HEADER = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class HttpError(Exception):
    """A message that is not allowed, or a request without a result: what a server answers."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    def response(self) -> Response:
        """The response to send."""
        return Response(self.status, f"{self}\n".encode())


class Response(NamedTuple):
    """A response, sent or received; with `keep_alive` the connection that it came on may stay open."""

    status: int
    body: bytes
    content_type: str = "text/plain"
    keep_alive: bool = True

    def encode(self, keep_alive: bool = True) -> bytes:
        """The bytes to send."""
        fields = f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
        ending = "" if keep_alive else "Connection: close\r\n"
        return f"HTTP/1.1 {self.status} \r\n{fields}{ending}\r\n".encode("latin-1") + self.body


class Request(NamedTuple):
    """A GET that was received: path and query, whether its connection may stay open, headers by name in lower case."""

    target: str
    keep_alive: bool
    headers: Mapping[str, str]


def encode_request(target: str, headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The bytes of a GET to send; UnicodeEncodeError if it is not ASCII, ValueError if a header would end its line."""
    fields = [f"{name}: {value}" for name, value in {"Host": HOST, **headers}.items()]
    if not all(map(_HEADER.fullmatch, fields)):
        raise ValueError(f"a header is a name and a value on one line, got {headers!r}")
    return "\r\n".join([f"GET {target} HTTP/1.1", *fields, "", ""]).encode("ascii")


async def read_request(reader: asyncio.StreamReader) -> Request:
    """Receive a GET.

    Raises:
        HttpError: if the request is malformed, too large or cut off, has a body, or is not a GET.
        ConnectionError: if the connection ends before the request begins.
    """
    try:
        (method, target), headers, length, keep_alive = await _read_head(reader, _REQUEST, default_length="0")
    except asyncio.IncompleteReadError as cut:
        if cut.partial:
            raise HttpError(400, "the client closed the connection before its request was complete") from None
        raise ConnectionError("the client closed the connection") from None
    if method != "GET":  # a proxy must be able to send a request twice
        raise HttpError(501, f"only GET is answered, got {method}")
    if "host" not in headers:
        raise HttpError(400, "a request of HTTP/1.1 names a Host")
    if length:
        raise HttpError(413, f"a GET has no body, got one of {length} bytes")
    return Request(target, keep_alive, headers)


async def read_response(reader: asyncio.StreamReader) -> Response:
    """Receive a response.

    Raises:
        HttpError: if the response is malformed or too large.
        ConnectionError: if the connection ends before the response is complete.
    """
    try:
        (status,), headers, length, keep_alive = await _read_head(reader, _RESPONSE)
        content_type = headers.get("content-type", "application/octet-stream")
        return Response(int(status), await reader.readexactly(length), content_type, keep_alive)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise ConnectionError("the server closed the connection before its response was complete") from error


async def _read_head(
    reader: asyncio.StreamReader, start_line: re.Pattern, default_length: str = "none"
) -> tuple[tuple[str, ...], dict[str, str], int, bool]:
    """Groups of the start line, headers by name in lower case, length of the body, and whether to keep alive."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise HttpError(431, f"start line and headers take more than {MAX_HEAD} bytes") from None
    start, *lines = head[:-4].decode("latin-1").split("\r\n")
    match, fields = start_line.fullmatch(start), [_HEADER.fullmatch(line) for line in lines]
    if match is None or None in fields:
        raise HttpError(400, "needs a first line of HTTP/1.1, then headers of a name, a colon and a value on one line")
    headers: dict[str, str] = {}
    for field in fields:
        name, value = field[1].lower(), field[2]
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "transfer-encoding" in headers:
        raise HttpError(501, "a body needs a Content-Length; transfer encodings are not supported")
    length = headers.get("content-length", default_length)
    if not re.fullmatch("[0-9]{1,19}", length):
        raise HttpError(400, f"Content-Length is one number, got {length}")
    if int(length) > MAX_BODY:
        raise HttpError(413, f"a body has at most {MAX_BODY} bytes, got {length}")
    options = re.split("[ \t]*,[ \t]*", headers.get("connection", "").lower())
    return match.groups(), headers, int(length), "close" not in options


class SharedTimeout:
    """One timeout, and one timer, for the waits of many tasks; asyncio.timeout sets and cancels a timer for each."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._timer = seconds, None
        self._deadlines: dict[asyncio.Task, float] = {}

    async def wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`; TimeoutError if it is not done in time."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        self._deadlines[task] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._expire)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._deadlines or task.uncancel():
                raise  # somebody else has cancelled the task
            raise TimeoutError(f"not done within {self.seconds} s") from None
        finally:
            self._deadlines.pop(task, None)

    def _expire(self) -> None:
        """Cancel the tasks that are late, and set the timer for the next deadline; most waits are long over then."""
        loop = asyncio.get_running_loop()
        for task in [task for task, deadline in self._deadlines.items() if deadline <= loop.time()]:
            del self._deadlines[task]
            task.cancel()
        self._timer = loop.call_at(min(self._deadlines.values()), self._expire) if self._deadlines else None


class Client:
    """Sends GET requests to the server on a port of this machine, `timeout` seconds for each, connecting included."""

    def __init__(self, port: int, timeout: float = 5.0) -> None:
        self._port, self._timeout, self._closed = port, SharedTimeout(timeout), False
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, target: str, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
        """Send a request, with these headers beside Host, and receive its response.

        An idle connection that the server has closed meanwhile says nothing about the server: another one is tried.

        Raises:
            OSError: if the server refuses, resets or closes the connection, or is too slow (TimeoutError).
            HttpError: if the response is malformed.
        """
        return await self._timeout.wait_for(self._get(encode_request(target, headers)))

    async def close(self) -> None:
        """Close the idle connections; one in use is closed after its response."""
        self._closed = True
        while self._idle:
            _, writer = self._idle.pop()
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def check_invariants(self) -> None:
        """No connection is idle twice, and none is once the client is closed."""
        assert len({writer for _, writer in self._idle}) == len(self._idle), "a connection is idle twice"
        assert not (self._closed and self._idle), "a closed client has open connections"

    async def _get(self, request: bytes) -> Response:
        while self._idle:
            with suppress(ConnectionError):
                return await self._exchange(*self._idle.pop(), request)
        return await self._exchange(*await asyncio.open_connection(HOST, self._port, limit=MAX_HEAD), request)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Response:
        keep_alive = False
        try:
            if not is_quiet(reader):
                raise ConnectionError("the server has ended this connection, or sent what no request asked for")
            writer.write(request)
            response = await read_response(reader)
            keep_alive = response.keep_alive and not self._closed
            return response
        finally:  # after a timeout the response may still come, and must not be taken for that to a later request
            if keep_alive:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()


class HttpServer:
    """Listens on 127.0.0.1 and answers every GET by calling a function.

    A request that cannot be answered gets a named error (400, 408, 413, 431, 501), and so does one whose function
    raises (the status of its HttpError; otherwise 500, and the log has the traceback).

    Args:
        answer: coroutine function, target → response.
        timeout: seconds that a client has to send a request, and to receive the response.
        with_headers: whether `answer` gets the request's headers as well, target, headers → response.

    Attributes:
        port: 0 before `start`.
    """

    def __init__(self, answer: Callable[..., Awaitable[Response]], timeout: float = 5.0, with_headers=False) -> None:
        self.port, self._server, self._with_headers = 0, None, with_headers
        self._answer, self._timeout = answer, SharedTimeout(timeout)
        self._connections: dict[asyncio.Task, asyncio.StreamWriter] = {}

    async def start(self) -> int:
        """Listen on a free port, or after `kill` on the same one again; returns the port."""
        if self._server:
            raise RuntimeError(f"it listens on port {self.port} already")
        self._server = await asyncio.start_server(self._serve, HOST, self.port, limit=MAX_HEAD, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def kill(self) -> None:
        """Stop as a killed process does, whatever goes on in the connections; returns when nothing is left of them."""
        if self._server:
            self._server.close()
            self._server = None
        for task, writer in self._connections.items():
            task.cancel()
            writer.transport.abort()
        await connections_end(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection one after the other."""
        self._connections[asyncio.current_task()] = writer
        writer.transport.set_write_buffer_limits(0)  # drain() waits until the kernel has everything
        try:
            with suppress(asyncio.CancelledError, OSError):  # killed; or the client is gone, or too slow to receive
                while self._server and await self._answer_next(reader, writer):
                    pass
        finally:
            del self._connections[asyncio.current_task()]
            writer.transport.abort()

    async def _answer_next(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Receive a request and send its response; whether the connection stays open."""
        try:
            request = await self._timeout.wait_for(read_request(reader))
            response, keep_alive = await self._respond(request), request.keep_alive
        except HttpError as error:
            response, keep_alive = error.response(), False
        except TimeoutError as late:
            if is_quiet(reader):
                return False  # no request has begun
            response, keep_alive = HttpError(408, f"the request was {late}").response(), False
        writer.write(response.encode(keep_alive))
        if writer.transport.get_write_buffer_size():
            await self._timeout.wait_for(writer.drain())
        if not keep_alive:  # to close with unread bytes would reset the connection and lose the response
            writer.write_eof()
            async with asyncio.timeout(LINGER):
                while await reader.read(MAX_BODY):
                    pass
        return keep_alive

    async def _respond(self, request: Request) -> Response:
        try:
            return await self._answer(request.target, *[request.headers] * self._with_headers)
        except HttpError as error:
            return error.response()
        except Exception:
            log.exception("no answer to %s", request.target)
            return HttpError(500, "an internal error, which the log of this server describes").response()


async def connections_end(tasks: Iterable[asyncio.Task]) -> None:
    """Wait for the cancelled tasks of a server's connections, those that are just being accepted among them."""
    for _ in range(4):  # turns of the event loop that it takes to accept a connection and to close it
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)


def is_quiet(reader: asyncio.StreamReader) -> bool:
    """Whether a stream has neither ended nor received a byte that has not been read."""
    peek = reader.read(1)
    try:
        peek.send(None)  # runs read until it returns, or until it would wait
    except (StopIteration, ConnectionError):
        return False
    finally:
        peek.close()
    return True
