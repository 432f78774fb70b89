"""The training job of the drills: four ranks, a tiny decoder, a checkpoint on the way, and all instruments on."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import torch

from minilib.mechanisms.basics.files import written_whole
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.checkpoint import Checkpointer
from minilib.operations.diagnosis.heartbeat import Heartbeat, read_pulse
from minilib.operations.diagnosis.links import TimedTransport
from minilib.operations.diagnosis.recorder import StepRecorder
from minilib.operations.drills.training.fault import SAVED_AT, STEPS, InjectedFault
from minilib.operations.drills.training.injector import Injector
from minilib.operations.flight_recorder import RecordedCommunicator, Recorder
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.config import TrainConfig
from minilib.training.trainer import Trainer

SHAPE = ModelConfig(64, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_position=64)
CONFIG = TrainConfig(steps=STEPS, batch_size=16, context=32, warmup=4, evaluate_every=100, validation_batches=1)
PERIOD = 0.02  # seconds between heartbeats, so that a drill need not wait for long
CALLS = 200  # collectives that a rank's flight recorder keeps
TIMEOUT = 600.0  # seconds that a rank waits for another: the watchdog ends a job that hangs, not the ranks


def train_with_fault(folder: Path, fault: InjectedFault | None) -> None:
    """On each rank: train, with the fault, and leave in the folder what the instruments have seen."""
    for_checkpoints = Communicator(SharedMemoryTransport(timeout=TIMEOUT))
    rank, world_size = for_checkpoints.rank, for_checkpoints.world_size
    injector = Injector(fault, rank)
    timed = TimedTransport(ShapedTransport(SharedMemoryTransport(timeout=TIMEOUT), injector.link))
    model = Decoder(SHAPE)
    model.initialize(0)
    with (
        Heartbeat(beat_path(folder, rank), PERIOD) as heartbeat,
        StepRecorder(folder, rank, model, 1, heartbeat) as recorder,
    ):
        calls = Recorder(calls_path(folder, rank), rank, CALLS)
        comm = RecordedCommunicator(recorder.metered(Communicator(timed)), calls)
        error: BaseException | None = None
        try:
            trainer = Trainer(model, *tokens(), CONFIG, comm, phases=injector.around(recorder))
            injector.attach(trainer)
            path = folder / "checkpoints"
            with Checkpointer(path, for_checkpoints, open_disk=lambda: injector.disk(path)) as checkpointer:
                trainer.run(SAVED_AT, recorder.end_step, bar=False)
                checkpointer.save({"run": trainer}, trainer.step)
                trainer.run(after_step=recorder.end_step, bar=False)
        except (OSError, RuntimeError) as caught:
            error = caught
        if error is None:
            calls.close()
        write_end(folder, rank, recorder.step, error, timed)
        heartbeat.tell(recorder.step, "failed" if error else "done")
        if error:
            _wait_for_others(folder, world_size)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and to hold out: digits that count up, which a tiny model learns."""
    return torch.arange(4000) % 61, torch.arange(200) % 61


def beat_path(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat."""
    return folder / f"{rank}.beat"


def calls_path(folder: Path, rank: int) -> Path:
    """The file of a rank's flight recorder."""
    return folder / f"{rank}.calls"


def end_path(folder: Path, rank: int) -> Path:
    """The file in which a rank says how it ended."""
    return folder / f"{rank}.end"


def write_end(folder: Path, rank: int, step: int, error: BaseException | None, timed: TimedTransport) -> None:
    """How a rank ended, and its ends of all messages."""
    cause = error.__cause__ if error is not None and isinstance(error.__cause__, OSError) else error
    said = error and {
        "type": type(error).__name__,
        "text": str(error),
        "errno": errno.errorcode.get(getattr(cause, "errno", None) or 0, ""),
    }
    end = {"step": step, "error": said, "sent": timed.sent, "received": timed.received}
    with written_whole(end_path(folder, rank)) as partial:
        partial.write_text(json.dumps(end))


def _wait_for_others(folder: Path, world_size: int, looks: int = 100) -> None:
    """Until they have ended, too, for a while: a rank that ends early takes the records of others with it."""
    for _ in range(looks):
        if all(read_pulse(beat_path(folder, rank)).over for rank in range(world_size)):
            return
        time.sleep(0.02)
