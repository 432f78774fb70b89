"""Where a program that is more than a gateway, such as a router for language models, takes part in each request.

    request received ──► answer ──► key_of, policy ──► dispatched ──► answered ──► ended ──► finished
                           │                               ▲             │ refused: the next backend
                           └─ a Reply: no backend          └─────────────┴─ failed: the next backend, if it may be

All but `answer` are plain functions: they run between two bytes of other streams and must not wait. One that raises
costs the request (500 if nothing has been sent), never the gateway.
"""

from __future__ import annotations

from enum import Enum

from minilib.classic.gateway.messages import GatewayRequest, Headers, Reply


class Ending(Enum):
    """How a request ended at one backend."""

    COMPLETE = "complete"
    """The client has been sent the whole response."""
    REFUSED = "refused"
    """The backend said that it has not begun (429, 503), and another one is asked."""
    FAILED = "failed"
    """The backend failed before a byte of its response had left."""
    CUT = "cut"
    """The backend failed in the middle of its response, and the client's connection was cut."""
    LEFT = "left"
    """The client left, or did not read, or the gateway was killed."""


class GatewayHooks:
    """Does nothing at every point; to be overridden."""

    async def answer(self, request: GatewayRequest) -> Reply | None:
        """Answer a request without any backend, as /metrics of the gateway itself; None to forward it.

        Raises:
            GatewayError: to refuse the request.
        """

    def dispatched(self, request: GatewayRequest, target: int) -> Headers:
        """The policy has chosen; nothing has been sent. Returns headers, in place of the client's."""
        return []

    def answered(self, request: GatewayRequest, target: int, status: int, headers: Headers) -> Headers:
        """The head of the response has come. Returns headers to add to what the client gets."""
        return []

    def ended(self, request: GatewayRequest, target: int, ending: Ending) -> None:
        """The request is over at this backend; called once for each `dispatched`."""

    def finished(self, request: GatewayRequest, error: BaseException | None) -> None:
        """The request is over for its client; `error` says why, if it has no whole response of a backend.

        Called once for each request that `answer` leaves, also where there was no backend to dispatch it to.
        """

    def last_words(self, request: GatewayRequest, target: int) -> bytes:
        """What a client is sent after the part of a response whose backend died, before its connection is cut.

        For protocols with errors in mid-stream, such as server-sent events; only sent in chunked responses.
        """
        return b""
