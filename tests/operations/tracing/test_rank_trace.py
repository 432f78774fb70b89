"""The buffer of a rank's trace: all that is written is read, also after a kill; what does not fit is counted."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from minilib.operations.tracing.rank_trace import RankTrace
from minilib.operations.tracing.recording import (
    BEGIN,
    COUNT,
    END,
    HEADER,
    MAGIC,
    NAMES,
    ROW,
    Recording,
    load_recording,
    read_recording,
)
from tests.operations.tracing.recordings import Clock, step_of


def test_what_is_written_is_read():
    recording = step_of(1).recording()
    assert (recording.rank, recording.host, recording.pid, recording.lost) == (1, "host-0", os.getpid(), 0)
    kinds = [(row.kind, row.name, row.value, row.group, row.number, row.num_bytes) for row in recording.rows]
    assert kinds == [
        (BEGIN, "step", 0, None, 3, 0),
        (COUNT, "allocated bytes", 101, None, None, 0),
        (BEGIN, "forward", 0, None, None, 0),
        (END, "", 0, None, None, 0),
        (BEGIN, "all_reduce", 0, "data", 7, 4096),
        (END, "", 0, None, None, 0),
        (COUNT, "allocated bytes", 51, None, None, 0),
        (END, "", 0, None, None, 0),
    ]
    times = [row.time_ns for row in recording.rows]
    assert times == sorted(times)


def test_nothing_recorded_is_a_recording():
    recording = RankTrace(0, capacity=2).recording()
    assert recording.rows == () and recording.host


def test_the_same_phase_may_lie_in_itself():
    trace = RankTrace(0)
    with trace("forward"), trace("forward"):
        pass
    assert [row.kind for row in trace.recording().rows] == [BEGIN, BEGIN, END, END]
    assert trace("forward") is trace("forward")


@pytest.mark.parametrize("capacity", range(2, 12))
def test_a_full_buffer_drops_whole_spans(capacity):
    """Whatever fits, every begin that was written has its end."""
    trace = RankTrace(0, capacity=capacity)
    for _ in range(3):
        with trace.span("step"), trace.span("forward"):
            trace.count("bytes", 1)
    kinds = [row.kind for row in trace.recording().rows]
    assert kinds.count(BEGIN) == kinds.count(END) and len(kinds) <= capacity
    assert trace.lost == trace.recording().lost == 9 - kinds.count(BEGIN) - kinds.count(COUNT)


def test_a_span_that_raises_ends():
    trace = RankTrace(0)
    with pytest.raises(KeyError), trace.span("step"):
        raise KeyError
    assert [row.kind for row in trace.recording().rows] == [BEGIN, END]


def test_names_without_room_are_the_last_that_had_it():
    trace = RankTrace(0, host="h")
    for number in range(200):
        trace.count(f"{number:04d}" + "x" * 996, 1)
    names = [row.name[:4] for row in trace.recording().rows]
    kept = (NAMES - 3) // 1002
    assert names[:kept] == [f"{number:04d}" for number in range(kept)] and set(names[kept:]) == {names[kept - 1]}


def test_refusals():
    trace = RankTrace(0)
    with pytest.raises(ValueError, match="no span is open"):
        trace.end()
    with pytest.raises(ValueError, match="a rank is"):
        RankTrace(-1)
    with pytest.raises(ValueError, match="capacity"):
        RankTrace(0, capacity=1)
    raised = []

    def elsewhere():
        try:
            trace.begin("step")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "one thread" in raised[0] and not trace.recording().rows


@pytest.mark.parametrize("cut", [0, 10, HEADER.size, HEADER.size + NAMES, HEADER.size + NAMES + 3 * ROW.size - 1])
def test_a_file_that_was_cut_is_refused_by_name(tmp_path, cut):
    path = tmp_path / "rank-0.trace"
    RankTrace(0, capacity=3, path=path).count("bytes", 1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="rank-0.trace"):
        load_recording(path)


def test_what_is_no_trace_is_refused_by_name():
    with pytest.raises(ValueError, match="begins with"):
        read_recording(bytes(10_000))


def test_a_rank_that_was_killed_before_its_first_name_has_recorded_nothing():
    buffer = bytearray(HEADER.size + NAMES + 2 * ROW.size)
    HEADER.pack_into(buffer, 0, MAGIC, 3, 77, 2, 0, 0, 0)
    assert read_recording(buffer) == Recording(3, "", 77, ())


def test_a_killed_rank_leaves_all_but_its_last_row(tmp_path):
    path = tmp_path / "rank-4.trace"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from minilib.operations.tracing.rank_trace import RankTrace\n"
        f"trace = RankTrace(4, path=Path({str(path)!r}), capacity=2**20)\n"
        "number = 0\n"
        "while True:\n"
        "    with trace.span('step', number), trace.span('forward'):\n"
        "        number += 1\n"
        "        if number == 100:\n"
        "            print('hundred', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "hundred\n"
        process.send_signal(signal.SIGKILL)
    rows = load_recording(path).rows
    depth = 0
    for row in rows:
        depth += {BEGIN: 1, END: -1}[row.kind]
        assert 0 <= depth <= 2
    steps = [row.number for row in rows if row.name == "step"]
    assert steps == list(range(len(steps))) and len(steps) >= 100


def test_a_span_costs_two_rows_and_few_calls():
    """Counted, not timed: no call but those of entering, writing and the clock, however many spans there are."""
    trace, calls = RankTrace(0, clock=Clock()), []
    with trace("forward"):
        pass

    def count(frame, event, _):
        if event == "call":
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        with trace("forward"):
            pass
    finally:
        sys.setprofile(None)
    assert len([name for name in calls if name != "__call__"]) <= 9, calls
