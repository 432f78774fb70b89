"""Recordings of ranks on one clock, in both formats: by schema, by reader, and with the faults that ranks have."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2
from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

from minilib.mechanisms.telemetry.spans import traces_of
from minilib.operations.tracing.chrome import chrome_trace, write_chrome_trace
from minilib.operations.tracing.clocks import ClockLine, ClockOffset
from minilib.operations.tracing.merging import merge_recordings
from minilib.operations.tracing.perfetto_format import perfetto_trace, write_perfetto_trace
from minilib.operations.tracing.rank_trace import RankTrace
from tests.operations.tracing.recordings import Clock, step_of

LATE = {0: 0, 1: 3000, 2: 100, 3: 200}


def four_ranks():
    return [step_of(rank, late).recording() for rank, late in LATE.items()]


def test_spans_are_trees_and_sides_of_a_collective_meet():
    merged = merge_recordings(four_ranks())
    assert [len(spans) for spans in merged.spans.values()] == [3] * 4
    for trace in traces_of(merged.all_spans):
        assert trace.root.name == "step" and not trace.orphans
        assert [span.name for span in trace.children(trace.root)] == ["forward", "all_reduce"]
    (sides,) = merged.collectives
    assert [side.process for side in sides] == ["rank 0", "rank 2", "rank 3", "rank 1"]
    assert [side.attributes["waited_ns"] for side in sides] == [3000, 2900, 2800, 0]
    assert {side.end_ns for side in sides} == {1_010_000}
    assert merged.bound_ns == 0 and set(merged.lost.values()) == {0}


def test_clocks_bring_ranks_together():
    """The same steps on clocks that are a second apart, and that drift."""
    clocks, recordings = {}, []
    for rank, recording in enumerate(four_ranks()):
        offset = (0, 10**9, -(10**5), 12345)[rank]
        rows = tuple(replace(row, time_ns=row.time_ns - offset) for row in recording.rows)
        recordings.append(replace(recording, rows=rows))
        clocks[rank] = ClockLine(ClockOffset(0, offset, 7), ClockOffset(10**6, offset, 9))
    merged, truth = merge_recordings(recordings, clocks), merge_recordings(four_ranks())
    assert merged.spans == truth.spans and merged.collectives == truth.collectives
    assert 14 <= merged.bound_ns <= 2 * 9 * 2000


def test_a_rank_that_died_leaves_spans_that_are_closed_and_marked():
    clock = Clock(1_000_000)
    dead = RankTrace(1, clock=clock, host="host-0")
    dead.begin("step", number=3)
    clock.move(100)
    dead.begin("forward")
    merged = merge_recordings([step_of(0).recording(), dead.recording()])
    step, forward = merged.spans[1]
    assert step.end_ns == forward.end_ns == 1_010_010 and forward.parent_id == step.span_id
    assert step.attributes == {"number": 3, "open": True} and forward.attributes == {"open": True}
    assert not any("open" in span.attributes for span in merged.spans[0])
    assert merged.collectives == ()  # one side alone waits for nobody that is known
    assert_valid(merged)


def test_no_rows_no_events():
    merged = merge_recordings([RankTrace(0).recording()])
    assert merged.spans == {0: ()} and [event["ph"] for event in chrome_trace(merged)["traceEvents"]] == ["M"] * 3
    assert_valid(merged)


def test_refusals():
    recording = RankTrace(0).recording()
    for wrong in ([], [recording, recording]):
        with pytest.raises(ValueError, match="one recording of each rank"):
            merge_recordings(wrong)
    with pytest.raises(ValueError, match=r"got none of \[0\]"):
        merge_recordings([recording], {})
    early = merge_recordings([step_of(0, begin=-5).recording()])
    with pytest.raises(ValueError, match="begin at 0"):
        perfetto_trace(early)


def test_chrome_events(tmp_path):
    document = chrome_trace(merge_recordings(four_ranks()))
    write_chrome_trace(document, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in complete} == {(0, 0), (0, 1), (1, 2), (1, 3)}
    assert min(event["ts"] for event in complete) == 0 and all(event["dur"] >= 0 for event in complete)
    arrows = [event for event in events if event["ph"] in "stf"]
    assert [(event["ph"], event["tid"]) for event in arrows] == [("s", 0), ("t", 2), ("t", 3), ("f", 1)]
    for arrow in arrows:  # each begins at a side
        assert any(
            (side["name"], side["tid"], side["ts"]) == (arrow["name"], arrow["tid"], arrow["ts"]) for side in complete
        )
    assert [event["args"]["value"] for event in events if event["ph"] == "C" and event["tid"] == 2] == [102, 52]


def test_perfetto_packets():
    assert_valid(merge_recordings(four_ranks()))


def assert_valid(merged):
    """By Perfetto's schema: fields it knows, names written before use, tracks told before use, slices nested."""
    trace = perfetto_trace_pb2.Trace()
    trace.ParseFromString(perfetto_trace(merged))
    slices, flows, tracks, names, stacks, clear = {}, {}, {}, {}, {}, set()
    for packet in trace.packet:
        assert not unknown(packet), packet
        sequence = packet.trusted_packet_sequence_id
        assert sequence
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            assert descriptor.uuid not in tracks
            assert descriptor.HasField("process") or descriptor.parent_uuid in tracks
            tracks[descriptor.uuid] = descriptor
            continue
        if packet.sequence_flags & 1:
            clear.add(sequence)
            names[sequence] = {}
        assert packet.sequence_flags & 2 and sequence in clear
        for name in packet.interned_data.event_names:
            assert name.iid and name.iid not in names[sequence]
            names[sequence][name.iid] = name.name
        event = packet.track_event
        track = tracks[event.track_uuid]
        if event.type == event.TYPE_SLICE_BEGIN:
            name = names[sequence][event.name_iid]
            stacks.setdefault(track.name, []).append((name, packet.timestamp))
            for flow in event.flow_ids:
                flows.setdefault(flow, []).append(track.name)
        elif event.type == event.TYPE_SLICE_END:
            name, begin = stacks[track.name].pop()
            slices.setdefault(track.name, []).append((name, begin, packet.timestamp))
        else:
            assert event.type == event.TYPE_COUNTER and track.HasField("counter")
    assert not any(stacks.values())
    expected = {
        f"rank {rank}": sorted((span.name, span.start_ns, span.end_ns) for span in spans)
        for rank, spans in merged.spans.items()
        if spans
    }
    assert {name: sorted(found) for name, found in slices.items()} == expected
    assert sorted(map(sorted, flows.values())) == sorted(
        sorted(side.process for side in sides) for sides in merged.collectives
    )


def unknown(message):
    """Fields that the schema does not have, anywhere in a message."""
    from google.protobuf import unknown_fields

    if len(unknown_fields.UnknownFieldSet(message)):
        return True
    return any(
        unknown(part)
        for field, value in message.ListFields()
        if field.type == field.TYPE_MESSAGE
        for part in (value if field.is_repeated else [value])
    )


def test_perfettos_trace_processor_reads_both_formats(tmp_path):
    shell = os.environ.get(
        "TRACE_PROCESSOR_SHELL", Path.home() / ".local/share/perfetto/prebuilts/trace_processor_shell"
    )
    if not Path(shell).is_file():
        pytest.skip(f"Perfetto's trace_processor_shell is not at {shell}; TRACE_PROCESSOR_SHELL says where it is")
    merged = merge_recordings(four_ranks())
    write_perfetto_trace(merged, tmp_path / "trace.pftrace")
    write_chrome_trace(chrome_trace(merged), tmp_path / "trace.json")
    expected = sorted((span.name, span.duration_ns) for span in merged.all_spans)
    for name in ("trace.pftrace", "trace.json"):
        config = TraceProcessorConfig(bin_path=str(shell))
        with TraceProcessor(trace=str(tmp_path / name), config=config) as processor:
            slices = [(row.name, row.dur) for row in processor.query("select name, dur from slice")]
            assert sorted(slices) == expected
            assert next(iter(processor.query("select count(*) as n from flow"))).n == 3
            assert next(iter(processor.query("select count(*) as n from counter"))).n == 8
            bad = processor.query(
                "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
            )
            assert [(row.name, row.value) for row in bad] == []
