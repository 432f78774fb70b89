"""What a gateway allows: sizes and times of everything that somebody else decides, and which requests it sends twice.

    a client may      send a head slowly, a body slowly, nothing at all, too much of each; open connections; not read
    a backend may     not accept, not answer, stop in the middle of an answer, answer too much for a slow client

Each has a limit here, so that no client and no backend can hold more than a bounded part of the gateway for longer than
a bounded time. In memory a connection has at most two copies of replay_body, what is held, and about 1 MB in buffers.

Source: RFC 9110, sections 9.2.2 (idempotent methods), 15.5.16 (429) and 15.6.4 (503); RFC 9112, section 9.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

CHUNK = 65536  # bytes; a stream that holds twice as many stops reading from its socket, which gives it 256 KiB at most
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


@dataclass(frozen=True)
class GatewayLimits:
    """Sizes in bytes and times in seconds.

    Args:
        max_head: start line and headers, of requests and of responses.
        max_body: body of a request.
        replay_body: as much of a request's body as is received before a backend is chosen; what fits can be retried.
        max_connections: of clients; as many again are told 503, and further ones are closed at once.
        max_idle: connections kept open to each backend.
        idle_within: until an idle client begins its next request.
        head_within: from the first byte of a request's head to its last.
        body_within: for the whole body of a request, plus one second for each `slowest_body` bytes.
        slowest_body: bytes a second that a client must send for longer.
        send_within: for a client, and for a backend, to take what is sent.
        connect_within, answer_within: for a backend to accept a connection; to send the head of its response.
        stall_within: between two pieces of a response.
        kept_within: that a connection to a backend is kept idle; below the backend's own limit (uvicorn: 5 s), or
            requests are sent on connections that the backend is about to close.

    Raises:
        ValueError: if one is not above 0; replay_body, max_body and max_idle may be 0.
    """

    max_head: int = 16384
    max_body: int = 16 << 20
    replay_body: int = 1 << 20
    max_connections: int = 1024
    max_idle: int = 64
    idle_within: float = 60.0
    head_within: float = 10.0
    body_within: float = 30.0
    slowest_body: float = 65536.0
    send_within: float = 30.0
    connect_within: float = 2.0
    answer_within: float = 60.0
    stall_within: float = 60.0
    kept_within: float = 4.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (value == 0 and field.name in ("max_body", "replay_body", "max_idle")):
                raise ValueError(f"{field.name} is above 0, got {value!r}")


@dataclass(frozen=True)
class RetryRule:
    """Which requests may be sent to another backend; always before the first byte of a response has left.

    A refused connection shows that nothing has begun: any request may go elsewhere. Of a request that was sent nobody
    knows what it has done, unless the backend says so, or its method is idempotent.

    Args:
        max_attempts: backends that a request is sent to, at most.
        refusals: statuses with which a backend says that it has not begun; 503 counts only with a Retry-After.
        methods: that may be sent again when nobody knows what the first attempt has done.
        timeouts: whether they may be after a backend was too slow, too: the next one has as much to do.

    Raises:
        ValueError: if max_attempts is below 1.
    """

    max_attempts: int = 3
    refusals: frozenset[int] = frozenset({429, 503})
    methods: frozenset[str] = IDEMPOTENT
    timeouts: bool = True

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"a request is attempted at least once, got {self.max_attempts!r}")

    def after_failure(self, method: str, was_sent: bool, timed_out: bool = False) -> bool:
        """Whether a request may go elsewhere, of which a part was sent to a backend that failed, or nothing."""
        return not was_sent or (method in self.methods and (self.timeouts or not timed_out))

    def after_refusal(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a response says that the request has not begun and may go elsewhere; names are in lower case."""
        return status in self.refusals and (status != 503 or any(name == b"retry-after" for name, _ in headers))


@dataclass(frozen=True)
class CheckRule:
    """Active checks: GET `path` on a connection of its own, again and again; 200 to 299 in time passes.

    Args:
        path: of the request.
        every, within: seconds between checks, and for one.

    Raises:
        ValueError: if a time is not above 0, or the path does not begin with /.
    """

    path: str = "/health"
    every: float = 1.0
    within: float = 1.0

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or not min(self.every, self.within) > 0:
            raise ValueError(f"a path begins with / and times are above 0, got {self}")
