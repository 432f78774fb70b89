"""A merged trace as Chrome's JSON, which chrome://tracing, Perfetto and TensorBoard's profiler read.

Complete events ("X") with pid = host and tid = rank, metadata that names both, counters ("C"), and arrows ("s", "t",
"f") between the sides of a collective. Times are µs since the trace begins, with nanoseconds behind the point.

Source: "Trace Event Format", Chromium project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilib.mechanisms.basics.files import written_whole
from minilib.mechanisms.telemetry.spans import Span
from minilib.operations.tracing.merging import MergedTrace

TraceDocument = dict[str, Any]


def chrome_trace(merged: MergedTrace) -> TraceDocument:
    """The document, to be written by `write_chrome_trace`.

    Its key `baseTimeNanoseconds` is the time of rank 0's clock at which `ts` is 0, as torch.profiler has it.
    """
    hosts = {name: number for number, name in enumerate(dict.fromkeys(merged.hosts.values()))}
    places = {rank: {"pid": hosts[name], "tid": rank} for rank, name in merged.hosts.items()}
    starts = [span.start_ns for span in merged.all_spans]
    starts += [value.time_ns for values in merged.counters.values() for value in values]
    zero = min(starts, default=0)
    events = [*_names(hosts, places)]
    for rank, spans in merged.spans.items():
        events += [_complete(span, zero, places[rank]) for span in spans]
    events += _counters(merged, zero, places)
    events += _arrows(merged, zero, places)
    return {"traceEvents": events, "displayTimeUnit": "ms", "baseTimeNanoseconds": zero}


def write_chrome_trace(document: TraceDocument, path: Path) -> None:
    """Write a document, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(document))


def _names(hosts: dict[str, int], places: dict[int, dict[str, int]]) -> Iterator[dict]:
    for name, pid in hosts.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    for rank, place in places.items():
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": rank}}


def _complete(span: Span, zero: int, place: dict[str, int]) -> dict:
    category = "collective" if "group" in span.attributes else "span"
    times = {"ts": (span.start_ns - zero) / 1000, "dur": span.duration_ns / 1000}
    return {"ph": "X", "name": span.name, "cat": category, **place, **times, "args": dict(span.attributes)}


def _counters(merged: MergedTrace, zero: int, places: dict[int, dict[str, int]]) -> Iterator[dict]:
    for rank, values in merged.counters.items():
        for value in values:  # a counter belongs to a process, so its name tells the rank
            when, name = (value.time_ns - zero) / 1000, f"{value.name}, rank {rank}"
            yield {"ph": "C", "name": name, **places[rank], "ts": when, "args": {"value": value.value}}


def _arrows(merged: MergedTrace, zero: int, places: dict[int, dict[str, int]]) -> Iterator[dict]:
    for number, sides in enumerate(merged.collectives, 1):
        for place, side in enumerate(sides):
            kind = "s" if place == 0 else "f" if place == len(sides) - 1 else "t"
            binding = {"bp": "e"} if kind == "f" else {}  # to the span around it, as the others are bound anyway
            when = {"ts": (side.start_ns - zero) / 1000, **places[int(side.process.removeprefix("rank "))]}
            yield {"ph": kind, "id": number, "name": side.name, "cat": "collective", **when, **binding}
