"""What it costs to record a collective: bytes from the layout, nanoseconds measured here."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch

from minilib.mechanisms.telemetry.ring import slot_bytes
from minilib.operations.flight_recorder.communicator import RecordedCommunicator
from minilib.operations.flight_recorder.recorder import CALL_BYTES, CALL_MARKS, Recorder, recording_bytes


class RecordingPrice(NamedTuple):
    """Of one rank's recorder.

    Args:
        ns: per recorded call, median over batches.
        bytes: per recorded call.
        total_bytes: of the whole recording, names included.
    """

    ns: float
    bytes: int
    total_bytes: int


def recording_price(capacity: int = 2000, calls: int = 500, batches: int = 9) -> RecordingPrice:
    """Record all-reduces of a communicator that does nothing, and of one that is not recorded; the difference.

    Cost: 2 · calls · batches calls of a few microseconds each.
    """
    if calls < 1 or batches < 1:
        raise ValueError(f"a price needs at least one batch of one call, got {batches} of {calls}")
    idle = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), all_reduce=_nothing)
    content = bytearray(recording_bytes(capacity))
    recorded = RecordedCommunicator(idle, Recorder(content, 0, capacity))
    tensor = torch.ones(1)
    differences = [_ns(recorded, tensor, calls) - _ns(idle, tensor, calls) for _ in range(batches)]
    return RecordingPrice(statistics.median(differences), slot_bytes(CALL_BYTES, CALL_MARKS), len(content))


def _nothing(tensor, op="sum", plan=None, async_op=False) -> None:
    """An all-reduce of one rank."""


def _ns(comm, tensor: torch.Tensor, calls: int) -> float:
    begin = time.thread_time_ns()
    for _ in range(calls):
        comm.all_reduce(tensor)
    return (time.thread_time_ns() - begin) / calls
