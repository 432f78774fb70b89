"""Recordings of many ranks on one clock: spans, values of counters, and which spans are sides of one collective.

rank 0   step ├── forward ──┤├─ all_reduce data/7 ─┤          arrows lead from the rank that came first
rank 1   step ├────── forward ──────┤├ all_reduce data/7 ┤    to the one that all the others waited for
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from minilib.mechanisms.telemetry.spans import Span
from minilib.operations.tracing.clocks import SAME_CLOCK, ClockLine
from minilib.operations.tracing.recording import BEGIN, COUNT, Recording, TraceRow


@dataclass(frozen=True)
class CounterValue:
    """A counter of a rank has this value from a time on."""

    name: str
    rank: int
    time_ns: int
    value: int


@dataclass(frozen=True)
class MergedTrace:
    """What all ranks did, in ns on the clock of rank 0.

    Args:
        hosts: name of the machine of each rank.
        spans: of each rank in the order in which they began, so parents come before children. An attribute `open`
            marks a span that never ended: its rank died or hung in it, or goes on. It is drawn to the end of the
            trace. A side of a collective has `group`, `number` and `waited_ns`, from its begin to that of the last
            side that came.
        counters: of each rank in the order of time.
        collectives: sides of one collective, in the order in which ranks came; those with one side are left out.
        lost: spans and values that did not fit, by rank.
        bound_ns: largest error between the times of two ranks.
    """

    hosts: Mapping[int, str]
    spans: Mapping[int, tuple[Span, ...]]
    counters: Mapping[int, tuple[CounterValue, ...]]
    collectives: tuple[tuple[Span, ...], ...]
    lost: Mapping[int, int]
    bound_ns: float

    @property
    def all_spans(self) -> list[Span]:
        """Of all ranks."""
        return [span for spans in self.spans.values() for span in spans]


def merge_recordings(recordings: Iterable[Recording], clocks: Mapping[int, ClockLine] | None = None) -> MergedTrace:
    """All recordings on the clock of rank 0.

    Args:
        recordings: one of each rank.
        clocks: of each rank against rank 0, see `exchange_clocks`; ranks of one machine whose traces use
            `time.monotonic_ns` share a clock and need none.

    Raises:
        ValueError: if there is no recording, two are of one rank, or a rank has no clock.
    """
    recordings = list(recordings)
    of_rank = {recording.rank: recording for recording in recordings}
    if len(of_rank) != len(recordings) or not recordings:
        raise ValueError(f"one recording of each rank is needed, got those of {[each.rank for each in recordings]}")
    if clocks is not None and (without := of_rank.keys() - clocks.keys()):
        raise ValueError(f"a clock of every rank is needed, got none of {sorted(without)}")
    lines = {rank: clocks[rank] if clocks is not None else SAME_CLOCK for rank in sorted(of_rank)}
    rows = {rank: _on_reference(of_rank[rank].rows, line) for rank, line in lines.items()}
    end = max((row.time_ns for of_one in rows.values() for row in of_one), default=0)
    spans = {rank: _spans(rank, of_one, end) for rank, of_one in rows.items()}
    collectives = _collectives(span for of_one in spans.values() for span in of_one)
    waited = {side.span_id: side for sides in collectives for side in sides}
    return MergedTrace(
        {rank: of_rank[rank].host for rank in rows},
        {rank: tuple(waited.get(span.span_id, span) for span in of_one) for rank, of_one in spans.items()},
        {
            rank: tuple(CounterValue(row.name, rank, row.time_ns, row.value) for row in of_one if row.kind == COUNT)
            for rank, of_one in rows.items()
        },
        collectives,
        {rank: of_rank[rank].lost for rank in rows},
        _largest_error(of_rank, lines),
    )


def _on_reference(rows: Iterable[TraceRow], line: ClockLine) -> list[TraceRow]:
    return [replace(row, time_ns=line.to_reference(row.time_ns)) for row in rows]


def _largest_error(recordings: Mapping[int, Recording], lines: Mapping[int, ClockLine]) -> float:
    """Of two ranks' times together; an error grows away from where it was measured, so first and last times tell."""
    bounds = [
        max((lines[rank].bound_ns(row.time_ns) for row in (*recording.rows[:1], *recording.rows[-1:])), default=0.0)
        for rank, recording in recordings.items()
        if lines[rank] is not SAME_CLOCK
    ]
    return sum(sorted(bounds)[-2:])


def _spans(rank: int, rows: list[TraceRow], end: int) -> tuple[Span, ...]:
    """Spans in the order in which they began; a tree of its own for each that lies in no other."""
    begun: list[Span] = []
    stack: list[int] = []
    trees = 0
    for row in rows:
        if row.kind == BEGIN:
            parent = begun[stack[-1]] if stack else None
            trees += parent is None
            trace = parent.trace_id if parent else f"{rank + 1:016x}{trees:016x}"
            ids = f"{rank + 1:08x}{len(begun):08x}", parent.span_id if parent else None
            stack.append(len(begun))
            begun.append(Span(row.name, trace, *ids, f"rank {rank}", row.time_ns, row.time_ns, _attributes(row)))
        elif row.kind != COUNT:
            number = stack.pop()
            begun[number] = replace(begun[number], end_ns=row.time_ns)
    for number in stack:
        span = begun[number]
        begun[number] = replace(span, end_ns=end, attributes={**span.attributes, "open": True})
    return tuple(begun)


def _attributes(row: TraceRow) -> dict[str, object]:
    known = {"group": row.group, "number": row.number, "bytes": row.num_bytes or None}
    return {name: value for name, value in known.items() if value is not None}


def _collectives(spans: Iterable[Span]) -> tuple[tuple[Span, ...], ...]:
    sides: dict[tuple[str, int, str], list[Span]] = {}
    for span in spans:
        if "group" in span.attributes:
            key = span.attributes["group"], span.attributes["number"], span.name
            sides.setdefault(key, []).append(span)
    return tuple(_in_order(of_one) for of_one in sides.values() if len(of_one) > 1)


def _in_order(sides: list[Span]) -> tuple[Span, ...]:
    last = max(side.start_ns for side in sides)
    told = [replace(side, attributes={**side.attributes, "waited_ns": last - side.start_ns}) for side in sides]
    return tuple(sorted(told, key=lambda side: side.start_ns))
