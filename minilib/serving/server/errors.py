"""Errors as clients of OpenAI's API expect them: one body for every status, and the headers that steer a retry.

The official client repeats a request after 408, 409, 429 and everything from 500 on, `Retry-After` seconds later if
these are at most 120, and not at all where `x-should-retry: false` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from minilib.serving.asynchronous.errors import EngineDied, EngineNotReady, EngineStopped, QueueFull, RequestAborted
from minilib.serving.request import InvalidRequest

LONGEST_WAIT = 120  # seconds; after a larger Retry-After the official client does not try again at all
INVALID, AUTHENTICATION, LIMIT = "invalid_request_error", "authentication_error", "rate_limit_error"
UNAVAILABLE, SERVER = "service_unavailable_error", "server_error"


class ApiError(Exception):
    """A request is refused, or failed.

    Args:
        status: of the HTTP response.
        message: what came, what was expected and how to mend it.
        code: short name of what is wrong, for programs.
        param: the field of the request that is wrong.
        kind: OpenAI's class of errors, `type` in the body.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The JSON document {"error": {"message", "type", "param", "code"}}."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def retry_after(seconds: float) -> dict[str, str]:
    """The header that asks a client to wait, for 1 to 120 whole seconds."""
    return {"Retry-After": str(min(max(round(seconds), 1), LONGEST_WAIT))}


def unavailable(message: str, code: str, seconds: float = 1) -> ApiError:
    """503: the engine is starting, restarting, draining or dead."""
    return ApiError(503, message, code, kind=UNAVAILABLE, headers=retry_after(seconds))


def as_api_error(error: BaseException, wait: float) -> ApiError:
    """What a client is told about an error of the engine.

    Args:
        error: what was raised.
        wait: seconds after which the queue is probably shorter.
    """
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, str(error), "invalid_value")
        case QueueFull():
            message = f"{error.waiting} requests wait already, and no more may; send the request again later"
            return ApiError(429, message, "queue_full", kind=LIMIT, headers=retry_after(wait))
        case EngineNotReady():
            return unavailable(str(error), "engine_not_ready", error.retry_after)
        case EngineStopped():
            return unavailable(str(error), "engine_stopped", wait)
        case RequestAborted():
            return unavailable(str(error), "request_aborted", wait)
        case EngineDied():
            return unavailable(str(error), "engine_died", wait)
    return ApiError(500, "the server failed; its log says why", "internal_error", kind=SERVER)
