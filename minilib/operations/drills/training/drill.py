"""Run the training job of the drills with a fault, and collect what the instruments have seen of it.

The evidence does not hold the fault. A watchdog ends a job that stands still: it counts heartbeats, not seconds, so a
machine that is busy with other things makes it wait longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minilib.operations.diagnosis.heartbeat import Pulse, PulseWatch
from minilib.operations.diagnosis.links import MessageEnd, link_times
from minilib.operations.diagnosis.liveness import SILENT, RankError
from minilib.operations.diagnosis.recorder import steps_path
from minilib.operations.diagnosis.step_record import StepRecord, in_step, read_step_records
from minilib.operations.drills.training.fault import WORLD_SIZE, InjectedFault
from minilib.operations.drills.training.job import beat_path, end_path, train_with_fault
from minilib.operations.flight_recorder import Dump, read_dumps
from minilib.ranks.launch import RankFailed, run

STILL = 60  # beats of every rank without progress, after which a job hangs
STILL_STEPS = 20  # and as many times the beats of its median step
LIMIT = 300.0  # seconds for a whole run, whatever happens


@dataclass(frozen=True)
class Evidence:
    """What the instruments have seen of one run.

    Args:
        steps: for each step that all ranks have recorded, the records of ranks 0, 1, …
        pulses: the heartbeats, as last read.
        silent: for each rank, beats of others since its own last one.
        died: ranks whose process was gone before the watchdog did anything.
        errors: of ranks that ended in one.
        links: for each link (src, dst) the bytes of its messages and the ns that each took at most.
        dumps: the flight recorders of all ranks.
    """

    steps: Sequence[tuple[StepRecord, ...]]
    pulses: Sequence[Pulse]
    silent: Sequence[int]
    died: Sequence[int]
    errors: Sequence[RankError]
    links: Mapping[tuple[int, int], Sequence[tuple[int, int]]]
    dumps: Sequence[Dump]


def run_drill(fault: InjectedFault | None) -> Evidence:
    """Run the job once, with a fault or healthy.

    Cost: about a second; two where ranks have to be missed first.
    """
    with tempfile.TemporaryDirectory(prefix="drill-") as name:
        folder, died = Path(name), []
        with Watchdog([beat_path(folder, rank) for rank in range(WORLD_SIZE)]) as watchdog:
            try:
                run(train_with_fault, WORLD_SIZE, folder, fault, timeout=LIMIT)
            except RankFailed as error:
                if "SIGKILL" not in str(error):
                    raise
                died = [] if watchdog.fired else [error.rank]
        runs = [read_step_records(steps_path(folder, rank)) for rank in range(WORLD_SIZE)]
        ends = [_end(folder, rank) for rank in range(WORLD_SIZE)]
        return Evidence(
            steps=in_step(runs),
            pulses=watchdog.watch.pulses,
            silent=watchdog.watch.silent,
            died=died,
            errors=[RankError(rank, end["step"], **end["error"]) for rank, end in enumerate(ends) if end["error"]],
            links=link_times(*([[MessageEnd(*m) for m in end[side]] for end in ends] for side in ("sent", "received"))),
            dumps=read_dumps(folder, "*.calls"),
        )


class Watchdog:
    """Ends the ranks of a job that stands still, or has lost a rank, while it is entered.

    Args:
        paths: of the ranks' heartbeats.

    Attributes:
        watch: the heartbeats, as last read while the job lived.
        fired: whether it has ended the job.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.watch, self.fired, self._ended = PulseWatch(paths), False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self.fired:
            self.watch.look()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self.watch.look()
            if stands_still(self.watch.pulses) or max(self.watch.silent) >= SILENT:
                self.fired = True
                for pulse in (each for each in self.watch.pulses if each.pid):  # 0 is the watchdog's own process group
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pulse.pid, signal.SIGKILL)
                return


def stands_still(pulses: Sequence[Pulse]) -> bool:
    """Whether no rank has made progress for STILL of its beats, and for STILL_STEPS of its steps."""
    if not all(pulse.pid for pulse in pulses) or all(pulse.over for pulse in pulses):
        return False
    pace = statistics.median((pulse.beats - pulse.still) / max(1, pulse.step) for pulse in pulses)
    return min(pulse.still for pulse in pulses if not pulse.over) >= max(STILL, STILL_STEPS * pace)


def _end(folder: Path, rank: int) -> dict:
    path = end_path(folder, rank)
    return json.loads(path.read_text()) if path.exists() else {"error": None, "sent": [], "received": []}
