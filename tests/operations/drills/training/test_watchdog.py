"""The watchdog of a drill, and what a rank that it kills leaves behind."""

import json
import os
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilib.operations.diagnosis.liveness import SILENT
from minilib.operations.drills.training.drill import Watchdog
from minilib.operations.drills.training.job import end_path, write_end


def write_pulse(path: Path, pid: int, beats: int) -> None:
    path.write_bytes(struct.pack("<5q", pid, beats, beats, 0, 0))


def test_a_rank_that_has_not_begun_is_not_killed(tmp_path, monkeypatch):
    """Process 0 would be the whole group of processes to which the watchdog itself belongs."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    paths = [tmp_path / f"{rank}.beat" for rank in range(4)]  # rank 3 has not begun, and rank 1 is silent
    for rank in (0, 1, 2):
        write_pulse(paths[rank], 100 + rank, 1)
    with Watchdog(paths) as watchdog:
        for rank in (0, 2):
            write_pulse(paths[rank], 100 + rank, 1 + SILENT)
        watchdog._thread.join(60)
    assert watchdog.fired and killed == [(pid, signal.SIGKILL) for pid in (100, 101, 102)]


def test_what_a_killed_rank_was_about_to_say_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    timed = SimpleNamespace(sent=[], received=[])
    real = Path.write_text

    def half_written(path: Path, text: str, **options) -> None:
        real(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", half_written)
        write_end(tmp_path, 0, 3, None, timed)
    assert not [*tmp_path.iterdir()]
    write_end(tmp_path, 0, 3, None, timed)
    assert json.loads(end_path(tmp_path, 0).read_text())["step"] == 3
