"""What one client may cost: bytes, seconds and numbers, each refused by name where it is too much."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields

from starlette.requests import ClientDisconnect, Request

from minilib.serving.server.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Limits of a server, all above 0.

    Args:
        body_bytes: most bytes of a request's body.
        body_seconds: most seconds until a body has come.
        header_bytes: most bytes of the headers of a request.
        header_seconds: most seconds until the headers of a request have come.
        request_seconds: most seconds that a request may take, its wait in the queue included.
        slow_client_seconds: most seconds that a client may leave what was written to it unread.
        send_bytes: of a client that does not read, that the system keeps, about; its own limit is megabytes.
        keep_alive_seconds: most seconds that a connection stays open between two requests.
        prompts: most prompts of one request.
        samples: most samples of one request, n times its prompts.
        stop_strings: most strings in `stop`.
        stop_characters: longest string in `stop`.

    Raises:
        ValueError: if one is not above 0.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30
    header_bytes: int = 2**16
    header_seconds: float = 20
    request_seconds: float = 600
    slow_client_seconds: float = 30
    send_bytes: int = 2**18
    keep_alive_seconds: int = 75
    prompts: int = 64
    samples: int = 128
    stop_strings: int = 4
    stop_characters: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be above 0, got {getattr(self, field.name)!r}")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request, counted while it comes.

    Raises:
        ApiError: 413 if it is too large, 408 if it does not come in time, 400 if it is cut short.
    """
    too_large = ApiError(413, f"the body has more than {limits.body_bytes} bytes", "body_too_large")
    too_large.headers["Connection"] = "close"  # the rest of the body is not read
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {limits.body_seconds:g} s"
        raise ApiError(408, message, "body_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the body was cut short", "body_cut_short") from None
    return bytes(body)
