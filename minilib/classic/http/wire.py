"""HTTP/1.1 as far as balancing needs it: messages with a Content-Length, as bytes and back.

What is left out is refused by name and never guessed: chunked bodies, folded headers, bodies that end with the
connection.

Source: RFC 9112, "HTTP/1.1".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from types import MappingProxyType

MAX_HEAD, MAX_BODY = 8192, 65536  # bytes
_REQUEST = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])")
_RESPONSE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~]*)?")
_HEADER = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")


class BadMessage(ValueError):
    """What came is no message that is understood here.

    Args:
        status: what a server answers.
        reason: what is wrong.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A request that came.

    Args:
        method: such as GET.
        target: path and query.
        body: bytes that came with it.
        keep_alive: the connection may stay open after the answer.
    """

    method: str
    target: str
    body: bytes = b""
    keep_alive: bool = True


@dataclass(frozen=True)
class Response:
    """An answer, come or to go.

    Args:
        status: such as 200.
        body: its bytes.
        headers: beside Content-Length and Connection; names in lower case where it came.
        keep_alive: the connection stays open after it.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    keep_alive: bool = True

    def encode(self, keep_alive: bool = True) -> bytes:
        """Its bytes on the wire."""
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        ending = "" if keep_alive else "Connection: close\r\n"
        start = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
        return f"{start}{fields}Content-Length: {len(self.body)}\r\n{ending}\r\n".encode("latin-1") + self.body


def take_request(buffer: bytearray) -> Request | None:
    """Take a whole request out of what has come; None if it is not whole yet.

    Raises:
        BadMessage: if it can become none that is understood here.
    """
    taken = _take(buffer, _REQUEST)
    if taken is None:
        return None
    (method, target, minor), headers, body = taken
    if minor == "1" and "host" not in headers:
        raise BadMessage(400, "a request of HTTP/1.1 names a Host")
    return Request(method, target, body, _keep_alive(minor, headers))


def take_response(buffer: bytearray) -> Response | None:
    """Take a whole answer out of what has come; None if it is not whole yet.

    Raises:
        BadMessage: if it can become none that is understood here.
    """
    taken = _take(buffer, _RESPONSE)
    if taken is None:
        return None
    (minor, status), headers, body = taken
    return Response(int(status), body, headers, _keep_alive(minor, headers))


def _take(buffer: bytearray, start: re.Pattern) -> tuple[tuple[str, ...], Mapping[str, str], bytes] | None:
    """Start line, headers and body of the first message in the buffer, which is then gone from it."""
    if not buffer:
        return None
    end, line_end = buffer.find(b"\r\n\r\n"), buffer.find(b"\r\n")
    if end > MAX_HEAD or (end < 0 and len(buffer) > MAX_HEAD):
        raise BadMessage(431, f"start line and headers take more than {MAX_HEAD} bytes")
    if not 65 <= buffer[0] <= 90:
        raise BadMessage(400, "a message begins with a capital letter")
    if line_end < 0:
        return None
    match = start.fullmatch(buffer[:line_end].decode("latin-1"))
    if match is None:
        raise BadMessage(400, "the first line is none of HTTP/1.1")
    if end < 0:
        return None
    headers = _headers(buffer[line_end + 2 : end].decode("latin-1")) if end > line_end else {}
    length = _body_length(headers, start is _RESPONSE)
    if len(buffer) < end + 4 + length:
        return None
    body = bytes(buffer[end + 4 : end + 4 + length])
    del buffer[: end + 4 + length]
    return match.groups(), headers, body


@lru_cache(256)  # peers that keep a connection say the same again and again
def _headers(text: str) -> Mapping[str, str]:
    """Names in lower case and values; those that come twice are joined."""
    headers: dict[str, str] = {}
    for line in text.split("\r\n"):
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadMessage(400, "a header is a name, a colon and a value on one line")
        name = match[1].lower()
        headers[name] = f"{headers[name]}, {match[2]}" if name in headers else match[2]
    return MappingProxyType(headers)


def _body_length(headers: Mapping[str, str], required: bool) -> int:
    if "transfer-encoding" in headers:
        raise BadMessage(501, "a body comes with its Content-Length, other encodings are not understood")
    text = headers.get("content-length")
    if text is None and not required:
        return 0
    if text is None or not re.fullmatch("[0-9]{1,19}", text):
        raise BadMessage(400, f"Content-Length is one number, got {text!r}")
    if int(text) > MAX_BODY:
        raise BadMessage(413, f"a body has {MAX_BODY} bytes at most, got {text}")
    return int(text)


def _keep_alive(minor: str, headers: Mapping[str, str]) -> bool:
    wishes = {wish.strip().lower() for wish in headers.get("connection", "").split(",")}
    return "close" not in wishes and (minor == "1" or "keep-alive" in wishes)
