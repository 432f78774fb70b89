"""A ring of the last collectives of each rank, read and analysed when a job hangs."""

from minilib.operations.flight_recorder.analysis import analyse
from minilib.operations.flight_recorder.communicator import RecordedCommunicator
from minilib.operations.flight_recorder.reading import NotARecording, read_dump, read_dumps
from minilib.operations.flight_recorder.recorder import Recorder
from minilib.operations.flight_recorder.recording import Dump, RecordedCall, RecordedGroup
from minilib.operations.flight_recorder.verdict import Verdict

__all__ = [
    "Dump",
    "NotARecording",
    "RecordedCall",
    "RecordedCommunicator",
    "RecordedGroup",
    "Recorder",
    "Verdict",
    "analyse",
    "read_dump",
    "read_dumps",
]
