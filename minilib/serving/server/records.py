"""What a server knows of each request: when it came, waited, ran and ended, and whose it was.

    began            submitted      started          first          last          ended
      ├─ body, parse ─┤── queue ──────┤── prefill ─────┤── decode ────┤── writes ───┤

A record is filled while its request runs, at no more cost than the server's own metrics have, and handed once, at its
end, to an observer if there is one. What is open can be asked for at any time, as /status does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.types import Scope

from minilib.serving.asynchronous.token_stream import TokenStream
from minilib.serving.request import SamplingParams, TokenOutput

RECORD = "minilib.record"  # where a request's scope has its record
CONTEXT_HEADERS = (b"traceparent", b"tracestate")  # of W3C's Trace Context
SHOWN = 32  # open requests that are shown


@dataclass
class PromptRecord:
    """One prompt of a request, and what became of it; times in ns on the clock of `time.monotonic_ns`."""

    params: SamplingParams
    prompt_tokens: int
    submitted_ns: int
    stream: TokenStream | None = None
    first_ns: int | None = None
    last_ns: int | None = None
    ended_ns: int | None = None
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    @property
    def started_ns(self) -> int | None:
        """When its wait in the queue ended."""
        return self.stream.started_ns if self.stream else None

    def came(self, outputs: list[TokenOutput]) -> int | None:
        """Outputs have come; returns when the ones before did."""
        before, self.last_ns = self.last_ns, time.monotonic_ns()
        if before is None:
            self.first_ns, self.cached_tokens = self.last_ns, outputs[0].cached_tokens
        self.generated_tokens += len(outputs)
        return before


@dataclass
class RequestRecord:
    """One request of HTTP.

    Args:
        number: of the request at this server.
        method, route: of HTTP; the route is one that the server has, or "other".
        context: W3C's traceparent and tracestate, as the client sent them.
        began_ns: when its head had come.
        tenant: its user, empty if it says none.
        is_stream: whether tokens are sent as they come.
        prompts: those that were submitted.
        writing_since_ns: while a write waits for the client.
        status: of the response, None before it begins.
        error: short name of what went wrong.
        ended_ns: when all was written, or given up.
    """

    number: int
    method: str
    route: str
    context: dict[str, str]
    began_ns: int
    tenant: str = ""
    is_stream: bool = False
    prompts: list[PromptRecord] = field(default_factory=list)
    writing_since_ns: int | None = None
    status: int | None = None
    error: str | None = None
    ended_ns: int | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether none of its prompts has run."""
        return not any(prompt.started_ns for prompt in self.prompts)

    def shown(self, now_ns: int) -> dict[str, Any]:
        """As /status has it."""
        last = max((prompt.last_ns or prompt.started_ns or self.began_ns for prompt in self.prompts), default=now_ns)
        unread = 0 if self.writing_since_ns is None else now_ns - self.writing_since_ns
        return {
            "request": self.number,
            "tenant": self.tenant,
            "state": "waiting" if self.is_waiting else "running",
            "prompt_tokens": sum(prompt.prompt_tokens for prompt in self.prompts),
            "generated_tokens": sum(prompt.generated_tokens for prompt in self.prompts),
            "seconds": (now_ns - self.began_ns) / 1e9,
            "silent_seconds": (now_ns - last) / 1e9,
            "unread_seconds": unread / 1e9,
        }


def note_error(scope: Scope, error: str | None) -> None:
    """Note why a request is refused, unless it is one that has no record, as those of probes."""
    if record := scope.get(RECORD):
        record.error = error


class RequestObserver(Protocol):
    """Told of each request once, when it has ended, in the event loop; it must not wait."""

    def ended(self, record: RequestRecord) -> None: ...


class OpenRecords:
    """The records of requests that have not ended.

    Args:
        observer: told of each that ends; None for nobody.
    """

    def __init__(self, observer: RequestObserver | None = None) -> None:
        self.observer = observer
        self._numbers = itertools.count()
        self._open: dict[int, RequestRecord] = {}

    def begin(self, scope: Scope, route: str) -> RequestRecord:
        """A request has come; its scope has the record from now on."""
        context = {
            name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in CONTEXT_HEADERS
        }
        record = RequestRecord(next(self._numbers), scope["method"], route, context, time.monotonic_ns())
        self._open[record.number] = scope[RECORD] = record
        return record

    def end(self, record: RequestRecord) -> None:
        """A request has ended."""
        record.ended_ns = time.monotonic_ns()
        del self._open[record.number]
        if self.observer is not None:
            self.observer.ended(record)

    def __iter__(self) -> Iterator[RequestRecord]:
        """Those that generate."""
        return iter([record for record in self._open.values() if record.prompts])

    def shown(self) -> list[dict[str, Any]]:
        """Those that generate, the one that has been silent longest first; SHOWN at most."""
        now = time.monotonic_ns()
        shown = sorted((record.shown(now) for record in self), key=lambda entry: -entry["silent_seconds"])
        return shown[:SHOWN]
