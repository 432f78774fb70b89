"""A merged trace in Perfetto's own format: a sequence of protobuf packets, names written once and referred to.

    process track of each host ── track of each rank ── slices (begin, end), with flow ids for collectives
                                                     └─ a counter track for each counter

Every rank writes a packet sequence of its own, as a rank's tracing process would. Ranks are named tracks and no
threads: thread id 0 is the idle task to Perfetto, and rank 0 would vanish in it.

Source: perfetto.dev, "Building your own trace: TrackEvent and synthetic tracks"; trace_packet.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minilib.mechanisms.basics.files import written_whole
from minilib.mechanisms.telemetry.spans import Span
from minilib.operations.tracing.merging import MergedTrace
from minilib.operations.tracing.protobuf import bytes_field, fixed64_field, number_field, text_field

# Fields of the messages, by number in the schema
PACKET = 1
TIMESTAMP, SEQUENCE, TRACK_EVENT, INTERNED, SEQUENCE_FLAGS, DESCRIPTOR = 8, 10, 11, 12, 13, 60
UUID, TRACK_NAME, PROCESS, PARENT, COUNTER, ORDERING, ORDER = 1, 2, 3, 5, 8, 11, 12
TYPE, NAME_ID, TRACK, ANNOTATION, COUNTER_VALUE, FLOW = 9, 10, 11, 4, 30, 47
SLICE_BEGIN, SLICE_END, COUNTER_EVENT = 1, 2, 4
CLEARED, NEEDS_STATE = 1, 2  # flags of a sequence
EXPLICIT, SIZE_BYTES = 3, 3


def perfetto_trace(merged: MergedTrace) -> bytes:
    """The trace, for ui.perfetto.dev and Perfetto's trace processor.

    Raises:
        ValueError: if a time is before the beginning of rank 0's clock; Perfetto's times have no sign.
    """
    if early := [span for span in merged.all_spans if span.start_ns < 0]:
        raise ValueError(f"Perfetto's times begin at 0, got {early[0].start_ns} ns for {early[0].name!r}")
    hosts = {name: number for number, name in enumerate(dict.fromkeys(merged.hosts.values()), 1)}
    packets = [_descriptor(_process_track(name, pid), 1) for name, pid in hosts.items()]
    flows = {side.span_id: number for number, sides in enumerate(merged.collectives, 1) for side in sides}
    for rank, name in merged.hosts.items():
        packets += _of_rank(merged, rank, hosts[name], flows)
    return b"".join(bytes_field(PACKET, packet) for packet in packets)


def write_perfetto_trace(merged: MergedTrace, path: Path) -> None:
    """Write a merged trace, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_bytes(perfetto_trace(merged))


def _of_rank(merged: MergedTrace, rank: int, host: int, flows: dict[str, int]) -> Iterator[bytes]:
    sequence, track, names = rank + 2, (rank + 1) << 16, _InternedNames()
    yield _descriptor(_rank_track(track, host, rank), sequence)
    counters = {value.name: track + number for number, value in enumerate(_firsts(merged, rank), 1)}
    for name, uuid in counters.items():
        yield _descriptor(_counter_track(uuid, track, name), sequence)
    first = True
    for when, event, added in _events(merged, rank, track, counters, flows, names):
        flags = NEEDS_STATE | (CLEARED if first else 0)
        packet = number_field(TIMESTAMP, when) + number_field(SEQUENCE, sequence) + number_field(SEQUENCE_FLAGS, flags)
        yield packet + (bytes_field(INTERNED, added) if added else b"") + bytes_field(TRACK_EVENT, event)
        first = False


def _events(merged, rank, track, counters, flows, names) -> Iterator[tuple[int, bytes, bytes]]:
    """Time, event and names that are new in it, in the order of time; spans in spans as they began and ended."""
    values = iter(merged.counters[rank])
    value = next(values, None)
    for when, is_begin, span in _edges(merged.spans[rank]):
        while value is not None and value.time_ns <= when:
            yield value.time_ns, _counter_event(counters[value.name], value.value), b""
            value = next(values, None)
        if is_begin:
            name_id, added = names.number(span.name)
            yield when, _begin_event(span, track, name_id, flows.get(span.span_id)), added
        else:
            yield when, number_field(TYPE, SLICE_END) + number_field(TRACK, track), b""
    while value is not None:
        yield value.time_ns, _counter_event(counters[value.name], value.value), b""
        value = next(values, None)


def _edges(spans: tuple[Span, ...]) -> Iterator[tuple[int, bool, Span]]:
    """Begins and ends by time, where a span ends after all that lie in it; spans come with parents first."""
    stack: list[Span] = []
    for span in spans:
        while stack and stack[-1].span_id != span.parent_id:
            ended = stack.pop()
            yield ended.end_ns, False, ended
        yield span.start_ns, True, span
        stack.append(span)
    while stack:
        ended = stack.pop()
        yield ended.end_ns, False, ended


def _firsts(merged: MergedTrace, rank: int) -> list:
    return list({value.name: value for value in reversed(merged.counters[rank])}.values())[::-1]


class _InternedNames:
    """Names of events by number, each written where it is used first."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> tuple[int, bytes]:
        """A name's number, and what has to be written before it is used; nothing from the second time on."""
        if name in self._numbers:
            return self._numbers[name], b""
        number = self._numbers[name] = len(self._numbers) + 1  # 0 is no number
        return number, bytes_field(2, number_field(1, number) + text_field(2, name))


def _descriptor(track: bytes, sequence: int) -> bytes:
    return number_field(SEQUENCE, sequence) + bytes_field(DESCRIPTOR, track)


def _process_track(name: str, pid: int) -> bytes:
    process = number_field(1, pid) + text_field(6, name)
    return number_field(UUID, pid) + bytes_field(PROCESS, process) + number_field(ORDERING, EXPLICIT)


def _rank_track(uuid: int, host: int, rank: int) -> bytes:
    order = number_field(ORDER, rank)
    return number_field(UUID, uuid) + number_field(PARENT, host) + text_field(TRACK_NAME, f"rank {rank}") + order


def _counter_track(uuid: int, parent: int, name: str) -> bytes:
    counter = number_field(3, SIZE_BYTES) if "bytes" in name else b""
    head = number_field(UUID, uuid) + number_field(PARENT, parent) + text_field(TRACK_NAME, name)
    return head + bytes_field(COUNTER, counter)


def _begin_event(span: Span, track: int, name_id: int, flow: int | None) -> bytes:
    event = number_field(TYPE, SLICE_BEGIN) + number_field(TRACK, track) + number_field(NAME_ID, name_id)
    if flow is not None:
        event += fixed64_field(FLOW, flow)
    return event + b"".join(bytes_field(ANNOTATION, _annotation(*item)) for item in span.attributes.items())


def _annotation(name: str, value: object) -> bytes:
    """A name and a value: field 2 for a truth, 4 for a whole number, 6 for text."""
    if isinstance(value, bool):
        told = number_field(2, int(value))
    elif isinstance(value, int):
        told = number_field(4, value)
    else:
        told = text_field(6, str(value))
    return text_field(10, name) + told


def _counter_event(track: int, value: int) -> bytes:
    return number_field(TYPE, COUNTER_EVENT) + number_field(TRACK, track) + number_field(COUNTER_VALUE, value)
