"""Spans as they happen: the open one is known to the task, and children are told whose children they are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from minilib.classic.observed_service.traceparent import TraceContext
from minilib.mechanisms.telemetry import HeadSampler, Span

_current: ContextVar[TraceContext | None] = ContextVar("current span", default=None)
ALL = HeadSampler(1.0)


def now_ns() -> int:
    """The time of the running event loop, in ns."""
    return round(asyncio.get_running_loop().time() * 1e9)


class Tracer:
    """Records the spans of one process.

    A task that is started within a span inherits it, as asyncio copies the context variables.

    Args:
        process: its name in the spans.
        spans: where finished spans go, in order of their ends; several tracers may share the list.
        ids: where ids come from.
        sampler: decides for traces that begin here; all others follow the decision of the process that began them.
    """

    def __init__(self, process: str, spans: list[Span], ids: random.Random, sampler: HeadSampler = ALL) -> None:
        self.process, self._spans, self._ids, self._sampler = process, spans, ids, sampler

    @property
    def current(self) -> TraceContext | None:
        """The span that is open in this task, as a header tells it."""
        return _current.get()

    @contextmanager
    def span(self, name: str, parent: TraceContext | None = None, **attributes: Any) -> Iterator[dict[str, Any]]:
        """Open a span; it ends with the block, and `error` names the exception that ended it.

        Args:
            name: what is done.
            parent: the caller's span in another process; None for the open span of this task, or a new trace.
            attributes: what is known at the start.

        Yields:
            The attributes, to which what becomes known may be added.
        """
        parent = parent or _current.get()
        trace_id = parent.trace_id if parent else self._new_id(128)
        sampled = parent.sampled if parent else self._sampler.weight(trace_id) > 0
        context = TraceContext(trace_id, self._new_id(64), sampled)
        start, token = now_ns(), _current.set(context)
        try:
            yield attributes
        except BaseException as error:
            attributes.setdefault("error", type(error).__name__)
            raise
        finally:
            _current.reset(token)
            if context.sampled:
                parent_id = parent.span_id if parent else None
                ended = Span(name, trace_id, context.span_id, parent_id, self.process, start, now_ns(), attributes)
                self._spans.append(ended)

    def _new_id(self, bits: int) -> str:
        return f"{self._ids.randrange(1, 1 << bits):0{bits // 4}x}"
