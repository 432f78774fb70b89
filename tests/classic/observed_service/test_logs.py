"""Logs: whole JSON of a bounded length, and the last records of a process that was killed at any moment."""

import json
import random

import pytest

from minilib.classic.observed_service.logs import RECORD_BYTES, JsonLog, kill_while_logging, read_log
from minilib.classic.observed_service.traceparent import TraceContext

CONTEXT = TraceContext("a" * 32, "b" * 16)


def test_a_record_has_time_process_message_trace_and_fields(tmp_path):
    log = JsonLog("auth/0", tmp_path / "log")
    assert [log.write(5, "request failed", CONTEXT, status=503), log.write(6, "stopped")] == [0, 1]
    expected = [
        {
            "time_ns": 5,
            "process": "auth/0",
            "message": "request failed",
            "trace_id": "a" * 32,
            "span_id": "b" * 16,
            "status": 503,
        },
        {"time_ns": 6, "process": "auth/0", "message": "stopped"},
    ]
    assert log.records() == expected == read_log(tmp_path / "log")
    log.close()
    assert read_log(tmp_path / "log") == expected


@pytest.mark.parametrize("message", ["x" * 10_000, '"' * 2000, "é" * 900, "\n" * 600, "𝄞" * 300])
def test_a_long_message_is_cut_and_the_record_stays_json(message):
    log = JsonLog("auth/0")
    log.write(1, message, CONTEXT, status=200)
    ((_, line),) = log.ring.records()
    record = json.loads(line)
    assert len(line) <= RECORD_BYTES and record["cut"] and message.startswith(record["message"])
    assert record["status"] == 200 and record["trace_id"] == CONTEXT.trace_id


def test_fields_that_alone_are_too_long_are_refused():
    log = JsonLog("auth/0")
    with pytest.raises(ValueError, match=f"at most {RECORD_BYTES} bytes"):
        log.write(1, "m", field="x" * RECORD_BYTES)
    with pytest.raises(TypeError):
        log.write(1, "m", field=object())
    assert log.records() == []


def test_the_ring_holds_the_last_records_and_goes_on_in_a_new_process(tmp_path):
    for begin in (0, 100):
        log = JsonLog("auth/0", tmp_path / "log", records=8)
        for number in range(begin, begin + 100):
            assert log.write(number, "m") == number
        log.close()
    assert [record["time_ns"] for record in read_log(tmp_path / "log")] == list(range(192, 200))


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_process_leaves_all_that_it_told_of(tmp_path, seed):
    """SIGKILL while it writes; at most the record that it was writing is torn, and that one nobody was told of."""
    told, records = kill_while_logging(tmp_path / "log", random.Random(seed).randrange(1, 3000))
    numbers = [record["request"] for record in records]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "without a gap"
    assert told <= numbers[-1] <= told + 1 and len(numbers) >= min(63, told + 1)
    assert all(int(record["trace_id"], 16) == record["request"] + 1 for record in records)
