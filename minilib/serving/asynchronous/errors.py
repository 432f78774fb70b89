"""Why an engine behind asyncio does not serve a request, by name."""

from __future__ import annotations

NEW_ENGINE = "send the request to another engine"  # what to do, in each message


class QueueFull(RuntimeError):
    """Too many requests wait already; the message says how many, and what to do.

    Args:
        waiting: requests that wait.
    """

    def __init__(self, waiting: int) -> None:
        super().__init__(
            f"{waiting} requests wait already, and no more may; send the request again later or to another engine, or "
            "give the engine a larger max_waiting"
        )
        self.waiting = waiting


class EngineStopped(RuntimeError):
    """The engine takes no more requests: it drains, was shut down, or died."""


class EngineNotReady(EngineStopped):
    """The engine's process starts, or starts again after a crash; the message says which.

    Args:
        message: what happens.
        retry_after: seconds after which a request may be taken.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestAborted(RuntimeError):
    """The engine stopped before the request was finished; what came before counts."""


class EngineDied(RuntimeError):
    """The thread or the process that steps the engine died; the message says of what, and `__cause__` if it raised."""
