"""What a gateway changes in the messages that it passes on, and how it says that it cannot.

A connection's own headers end here, since each side has another connection: those that RFC 9110 names, and those
that `Connection` names. How long a body is says the gateway itself, from what it has received: request smuggling needs
two readers that see different ends of one message.

Source: RFC 9110, sections 7.6.1 (Connection), 7.6.3 (Via) and 10.1.1 (Expect); RFC 9112, sections 3.2 (targets), 6.1
and 6.3 (length of a message), 11.2 (request smuggling).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

import h11

from minilib.classic.http.wire import HttpError

Headers = list[tuple[bytes, bytes]]
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
PROXY = frozenset({b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"})
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade"}) | FRAMING | PROXY
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class GatewayError(HttpError):
    """What a gateway answers itself, and why.

    Args:
        status: of the answer.
        reason: for people.
        retry_after: seconds after which the client may try again; None says nothing about that.
    """

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(status, reason)
        self.retry_after = retry_after


@dataclass
class Reply:
    """A whole answer of the gateway itself."""

    status: int
    body: bytes
    headers: Headers = field(default_factory=lambda: [(b"content-type", b"text/plain; charset=utf-8")])


@dataclass
class GatewayRequest:
    """A request as hooks and key functions see it.

    Attributes:
        method, target: as sent; the target is a path with its query, or * of OPTIONS.
        headers: names in lower case, as sent.
        peer: address of the client.
        body: the whole body, or its first bytes if it is longer than GatewayLimits.replay_body.
        body_is_whole: whether `body` is all of it; only then can the request be sent again.
        tried: backends that it has been sent to, in order.
        notes: free for hooks.
    """

    method: str
    target: str
    headers: Headers
    peer: str = ""
    body: bytes = b""
    body_is_whole: bool = True
    tried: list[int] = field(default_factory=list)
    notes: dict = field(default_factory=dict)

    def header(self, name: bytes) -> bytes | None:
        """The first header of this name, which is in lower case; None if there is none."""
        return next((value for found, value in self.headers if found == name), None)

    @property
    def has_length(self) -> bool:
        """Whether the client has said how long its body is, 0 included."""
        return any(name in FRAMING for name, _ in self.headers)


def accept(event: h11.Request, peer: str, max_body: int) -> GatewayRequest:
    """Check what h11 lets pass and a gateway must not.

    h11 refuses malformed messages. It takes a Content-Length beside a Transfer-Encoding, which the first reader of a
    chain may cut elsewhere than the second, and a Transfer-Encoding of HTTP/1.0, which has none.

    Raises:
        GatewayError: 400, 413, 417 or 501.
    """
    headers, method, target = list(event.headers), event.method.decode("ascii"), event.target.decode("ascii")
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
        raise GatewayError(
            400, "a length and a transfer encoding, or a transfer encoding of HTTP/1.0, have two meanings"
        )
    if method == "CONNECT":
        raise GatewayError(501, "this gateway makes no tunnels")
    length = next((value for name, value in headers if name == b"content-length"), b"0")
    if int(length) > max_body:
        raise GatewayError(413, f"a body has at most {max_body} bytes, got {int(length)}")
    expected = [value for name, value in headers if name == b"expect"]
    if any(value.lower() != b"100-continue" for value in expected):
        raise GatewayError(417, "nothing but 100-continue can be expected")
    if target[:7].lower() == "http://":  # the absolute form names the host, whatever Host says
        host, slash, path = target[7:].partition("/")
        if not host:
            raise GatewayError(400, "a target in absolute form names a host")
        headers = [(b"host", host.encode())] + [(name, value) for name, value in headers if name != b"host"]
        target = slash + path or "/"
    if not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
        raise GatewayError(400, "a target is a path that begins with /")
    return GatewayRequest(method, target, headers, peer)


def end_to_end(headers: Headers) -> Headers:
    """Headers without those of the connection that they came on, and without the length of the body."""
    listed = {
        option.strip().lower() for name, value in headers if name == b"connection" for option in value.split(b",")
    } - {b"host"}
    return [(name, value) for name, value in headers if name not in HOP_BY_HOP | listed]


def request_to_send(request: GatewayRequest, backend_host: str, extra: Headers) -> h11.Request:
    """The head that goes to a backend: the client's Host, where the request came from, and the length of the body.

    A header in `extra` takes the place of the client's.
    """
    ours = {b"x-forwarded-for", b"x-forwarded-proto", b"expect", b"via", *(name for name, _ in extra)}
    headers = [(name, value) for name, value in end_to_end(request.headers) if name not in ours]
    for name, mine in ((b"x-forwarded-for", request.peer.encode()), (b"via", b"1.1 minilib")):
        headers.append((name, b", ".join([value for found, value in request.headers if found == name] + [mine])))
    headers.append((b"x-forwarded-proto", b"http"))
    if request.header(b"host") is None:
        headers.append((b"host", backend_host.encode()))
    if not request.body_is_whole:
        length = request.header(b"content-length")
        headers.append((b"content-length", length) if length else (b"transfer-encoding", b"chunked"))
    elif request.has_length or request.body or request.method in METHODS_WITH_BODY:
        headers.append((b"content-length", b"%d" % len(request.body)))
    return h11.Request(method=request.method, target=request.target, headers=headers + extra)


def response_to_send(response: h11.Response) -> h11.Response:
    """The head that goes to the client; the length stays where it is known, or says what a GET would have had."""
    headers, raw = end_to_end(list(response.headers)), dict(response.headers)
    if b"content-length" in raw and b"transfer-encoding" not in raw and response.status_code != 204:
        headers.append((b"content-length", raw[b"content-length"]))
    return h11.Response(status_code=response.status_code, headers=headers, reason=response.reason)


def render_plainly(error: GatewayError) -> Reply:
    """The reason of an error as text."""
    return Reply(error.status, f"{error}\n".encode())


def reply_to_send(reply: Reply, retry_after: int | None = None, close: bool = False) -> tuple[h11.Response, h11.Data]:
    """Head and body of an answer of the gateway itself."""
    headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body))]
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % retry_after))
    if close:
        headers.append((b"connection", b"close"))
    try:
        reason = HTTPStatus(reply.status).phrase
    except ValueError:
        reason = ""
    return h11.Response(status_code=reply.status, headers=headers, reason=reason), h11.Data(data=reply.body)
