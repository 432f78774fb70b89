"""Spans: who did what from when to when, and because of whom; and what a tree of them says about a duration.

    request       ├──────────────────────────────────────┤
      auth           ├──────┤
      catalog                 ├──────────────────────┤
        shard 0                 ├────────┤
        shard 1                 ├────────────────┤
    critical path ├─┤auth   ├─┤c├─shard 1────────┤─c─┤r──┤     its parts add up to the request, to the nanosecond

The critical path is what would have to be shorter for the request to be shorter: shard 0 is not on it.

Source: Sigelman et al., "Dapper", 2010; Zhang et al., "CRISP: critical path analysis of large-scale microservice
architectures", USENIX ATC 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class BrokenTrace(ValueError):
    """Spans that are no tree: none, of several traces, an id twice, no root or several, or parents in a circle."""


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Args:
        name: what was done, the same for all requests of a kind ("GET /item", never "GET /item/17").
        trace_id: of the request or step that it belongs to; 32 hexadecimal digits where it crosses processes.
        span_id: its own, unique in the trace; 16 hexadecimal digits where it crosses processes.
        parent_id: the span that caused it; None for the root.
        process: who did it: an instance of a service, such as "store/2", or a rank.
        start_ns, end_ns: when, in ns on one clock.
        attributes: whatever else is known, by name.

    Raises:
        ValueError: if a span ends before it begins, or an id is empty.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    process: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.end_ns < self.start_ns:
            raise ValueError(f"span {self.name!r} ends {self.start_ns - self.end_ns} ns before it begins")
        if not self.trace_id or not self.span_id or self.parent_id == "":
            raise ValueError(f"ids are not empty, and a root has the parent None: {self}")

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from start to end."""
        return self.end_ns - self.start_ns


class PathSegment(NamedTuple):
    """A stretch of a critical path, in ns, in which nothing but this span itself was waited for."""

    span: Span
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from start to end."""
        return self.end_ns - self.start_ns


class Trace:
    """The spans of one request as a tree.

    A span whose parent is missing is an orphan: the parent's process died or lost it. It hangs from no span, and
    neither path nor self times count it.

    Args:
        spans: in any order; one of them has no parent.

    Attributes:
        spans: in order of their start.
        root: the span without a parent.
        orphans: spans whose parent is not among the spans.

    Raises:
        BrokenTrace: if they are no tree.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
        by_id = {span.span_id: span for span in self.spans}
        roots = [span for span in self.spans if span.parent_id is None]
        if len(by_id) != len(self.spans) or len({span.trace_id for span in self.spans}) > 1:
            raise BrokenTrace(f"{len(self.spans)} spans have {len(by_id)} ids, and one trace id is expected")
        if len(roots) != 1:
            raise BrokenTrace(f"one span has no parent, got {len(roots)} such among {len(self.spans)}")
        self.root = roots[0]
        self.orphans = [span for span in self.spans if span.parent_id is not None and span.parent_id not in by_id]
        self._children: dict[str | None, list[Span]] = {}
        for span in self.spans:
            self._children.setdefault(span.parent_id, []).append(span)
        reached = sum(1 for top in (self.root, *self.orphans) for _ in self.descend(top))
        if reached != len(self.spans):
            raise BrokenTrace(f"{len(self.spans) - reached} spans are their own ancestors")

    @property
    def trace_id(self) -> str:
        """The id that all spans share."""
        return self.root.trace_id

    @property
    def duration_ns(self) -> int:
        """Nanoseconds that the root took."""
        return self.root.duration_ns

    def children(self, span: Span) -> list[Span]:
        """The spans that this one caused, in order of their start."""
        return list(self._children.get(span.span_id, ()))

    def descend(self, span: Span) -> Iterator[Span]:
        """A span and all below it, parents first."""
        left = [span]
        while left:
            span = left.pop()
            yield span
            left += reversed(self.children(span))

    def self_ns(self, span: Span) -> int:
        """Nanoseconds of a span in which none of its children ran; what children do before or after it is left out."""
        alone, covered_until = span.duration_ns, span.start_ns
        for child in self.children(span):
            begin, end = max(child.start_ns, covered_until), min(child.end_ns, span.end_ns)
            if end > begin:
                alone, covered_until = alone - (end - begin), end
        return alone

    def critical_path(self) -> list[PathSegment]:
        """What the root waited for, moment by moment, from its start to its end; durations add up to its duration.

        From a span's end backwards: the child that ended last, then the child that ended last before that one began,
        and so on; the rest is the span's own. Children that end after their parent are cut off at its end.
        """
        path: list[PathSegment] = []
        stack = [_Walk(self.root, self.root.start_ns, self.root.end_ns, self._last_first(self.root))]
        while stack:
            walk = stack[-1]
            child = next((child for child in walk.children if walk.admits(child)), None)
            if child is None:
                walk.own_until(walk.begin, path)
                stack.pop()
                continue
            begin, end = max(child.start_ns, walk.begin), min(child.end_ns, walk.end)
            walk.own_until(end, path)
            walk.now = begin
            stack.append(_Walk(child, begin, end, self._last_first(child)))
        return path[::-1]

    def _last_first(self, span: Span) -> Iterator[Span]:
        return iter(sorted(self.children(span), key=lambda child: child.end_ns, reverse=True))


@dataclass
class _Walk:
    """How far back the critical path has come in one span, which counts from `begin` to `end` only."""

    span: Span
    begin: int
    end: int
    children: Iterator[Span]
    now: int = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.end

    def admits(self, child: Span) -> bool:
        """Whether a child ended before what is on the path already, and took time within the span."""
        end = min(child.end_ns, self.end)
        return max(child.start_ns, self.begin) < end <= self.now

    def own_until(self, moment: int, path: list[PathSegment]) -> None:
        """The span itself was waited for since this moment."""
        if moment < self.now:
            path.append(PathSegment(self.span, moment, self.now))
            self.now = moment


def traces_of(spans: Iterable[Span]) -> list[Trace]:
    """Spans of many requests as one Trace each, in the order in which their first spans come.

    Raises:
        BrokenTrace: if the spans of a trace are no tree.
    """
    by_trace: dict[str, list[Span]] = {}
    for span in spans:
        by_trace.setdefault(span.trace_id, []).append(span)
    return [Trace(of_trace) for of_trace in by_trace.values()]
