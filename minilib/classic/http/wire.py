"""HTTP/1.1 messages with a Content-Length on asyncio's streams, bounded in size and in time.

Chunked bodies, folded headers and bodies that end with the connection are refused by name.

Cost: an exchange takes about 1.4 times the processor time of one over a hand-written asyncio.Protocol on Python 3.11,
1.15 times without asyncio.timeout, and a request of an open-loop experiment 1.15 times.

Source: RFC 9112, "HTTP/1.1".
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

HOST = "127.0.0.1"  # clear-text HTTP without authentication stays on loopback
MAX_HEAD, MAX_BODY = 8192, 65536  # bytes; MAX_HEAD is the limit of every StreamReader here
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_REQUEST = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])")
_RESPONSE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~]*)?")
_HEADER = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")


class BadMessage(ValueError):
    """A message that HTTP/1.1 or this module does not allow; `status` is what a server answers."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A received request: `target` is path and query, with `keep_alive` the connection may stay open."""

    method: str
    target: str
    body: bytes = b""
    keep_alive: bool = True


@dataclass(frozen=True)
class Response:
    """A response: received headers have names in lower case, and Content-Length is added to those that are sent."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    keep_alive: bool = True

    def encode(self, keep_alive: bool = True) -> bytes:
        """The bytes to send."""
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        ending = "" if keep_alive else "Connection: close\r\n"
        start = f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, '')}\r\n"
        return f"{start}{fields}Content-Length: {len(self.body)}\r\n{ending}\r\n".encode("latin-1") + self.body


async def read_request(reader: asyncio.StreamReader, timeout: float) -> Request | None:
    """Receive a request; None if the client closes the connection, or sends no byte in time, before it begins.

    Raises:
        BadMessage: if the request is malformed, too large, cut off, or not complete within `timeout` seconds.
    """
    first = b""
    try:
        async with asyncio.timeout(timeout):
            first = await reader.read(1)
            if not first:
                return None
            (method, target, minor), headers, body = await _read_message(reader, _REQUEST, first)
    except ConnectionError as error:
        raise BadMessage(400, str(error)) from error
    except TimeoutError:
        if not first:
            return None
        raise BadMessage(408, f"a request must be complete within {timeout} s") from None
    if minor == "1" and "host" not in headers:
        raise BadMessage(400, "a request of HTTP/1.1 names a Host")
    return Request(method, target, body, _keep_alive(minor, headers))


async def read_response(reader: asyncio.StreamReader) -> Response:
    """Receive a response; the caller sets the timeout.

    Raises:
        BadMessage: if the response is malformed or too large.
        ConnectionError: if the connection ends before the response is complete.
    """
    (minor, status), headers, body = await _read_message(reader, _RESPONSE)
    return Response(int(status), body, headers, _keep_alive(minor, headers))


async def _read_message(
    reader: asyncio.StreamReader, start_line: re.Pattern, first: bytes = b""
) -> tuple[tuple[str, ...], dict[str, str], bytes]:
    """Groups of the start line, headers by name in lower case, and body; `first` has been read before."""
    try:
        head = first + await reader.readuntil(b"\r\n\r\n")
        start, *lines = head[:-4].decode("latin-1").split("\r\n")
        match = start_line.fullmatch(start)
        if match is None:
            raise BadMessage(400, "the first line is none of HTTP/1.1")
        headers = _parse_headers(lines)
        body = await reader.readexactly(_body_length(headers, required=start_line is _RESPONSE))
    except asyncio.LimitOverrunError:
        raise BadMessage(431, f"start line and headers take more than {MAX_HEAD} bytes") from None
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise ConnectionError("the peer closed the connection before its message was complete") from error
    return match.groups(), headers, body


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadMessage(400, "a header is a name, a colon and a value on one line")
        name = match[1].lower()
        headers[name] = f"{headers[name]}, {match[2]}" if name in headers else match[2]
    return headers


def _body_length(headers: Mapping[str, str], required: bool) -> int:
    if "transfer-encoding" in headers:
        raise BadMessage(501, "a body needs a Content-Length; transfer encodings are not supported")
    text = headers.get("content-length", None if required else "0")
    if text is None or not re.fullmatch("[0-9]{1,19}", text):
        raise BadMessage(400, f"Content-Length is one number, got {text!r}")
    if int(text) > MAX_BODY:
        raise BadMessage(413, f"a body has at most {MAX_BODY} bytes, got {text}")
    return int(text)


def _keep_alive(minor: str, headers: Mapping[str, str]) -> bool:
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    return "close" not in options and (minor == "1" or "keep-alive" in options)
