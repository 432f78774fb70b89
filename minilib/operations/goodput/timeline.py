"""What happened in a drill, and when: events that survive the ranks that write them, and the goodput they add up to.

start      a life begins: ranks are started
loaded     rank 0 stands at this step, and trains
step       rank 0 has completed this step
save       a rank begins to save this step; saved: it goes on
durable    the checkpoint of this step is durable
kill       a rank kills itself after this step
ended      the launcher knows that the life is over
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class DrillEvent:
    """Something that happened.

    Args:
        kind: see above.
        at: seconds of the host's monotonic clock.
        life: of the run, from 0.
        step: of the run.
        rank: that it happened on.
    """

    kind: str
    at: float
    life: int
    step: int = 0
    rank: int = 0


class EventFile:
    """A file to which several processes append events, each whole or not at all.

    Args:
        path: of the file; made with the first event.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, kind: str, life: int, step: int = 0, rank: int = 0) -> None:
        line = json.dumps(asdict(DrillEvent(kind, time.monotonic(), life, step, rank))) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # one call: another process's line does not come between
        finally:
            os.close(file)

    def read(self) -> Iterator[DrillEvent]:
        """All events, in order of time."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return iter(sorted((DrillEvent(**json.loads(line)) for line in lines), key=lambda event: event.at))


@dataclass(frozen=True)
class DrillTimeline:
    """A drill from the first life's first step to the last life's last.

    Args:
        events: in order of time.
    """

    events: tuple[DrillEvent, ...]

    @cached_property
    def kills(self) -> list[DrillEvent]:
        return self._of("kill")

    @cached_property
    def executed(self) -> int:
        """Steps that were completed, those that were lost included."""
        return len(self._of("step"))

    @property
    def useful(self) -> int:
        """Steps that count at the end."""
        return self._of("step")[-1].step

    @property
    def lost(self) -> int:
        """Steps that were taken again."""
        return self.executed - self.useful

    @cached_property
    def wall(self) -> float:
        """Seconds from when the first life trains to the last step, with its save."""
        return max(event.at for event in self.events if event.kind != "ended") - self._of("loaded")[0].at

    @cached_property
    def stalls(self) -> list[float]:
        """Seconds that steps waited for each save, on rank 0; a save that a kill ended has none."""
        begun = {(event.life, event.step): event.at for event in self._of("save") if event.rank == 0}
        ended = {(event.life, event.step): event.at for event in self._of("saved") if event.rank == 0}
        return [ended[key] - begun[key] for key in begun if key in ended]

    @cached_property
    def step_times(self) -> list[float]:
        """Seconds of each step but every life's first, without the saves' stalls."""
        found = []
        marks = [e for e in self.events if e.kind in ("step", "saved") and e.rank == 0]
        for before, after in zip(marks, marks[1:], strict=False):
            if after.kind == "step" and before.life == after.life:
                found.append(after.at - before.at)
        return found

    @cached_property
    def restarts(self) -> list[float]:
        """Seconds from each kill to the end of the first new step, less a step."""
        first = {}
        for event in self._of("step"):
            first.setdefault(event.life, event.at)
        return [first[kill.life + 1] - kill.at - self.step_seconds for kill in self.kills if kill.life + 1 in first]

    @cached_property
    def cut(self) -> list[float]:
        """Seconds of each step that a kill cut short."""
        found = []
        for kill in self.kills:
            marks = [e.at for e in self.events if e.life == kill.life and e.kind in ("loaded", "step", "saved")]
            found.append(max(0.0, kill.at - max((at for at in marks if at <= kill.at), default=kill.at)))
        return found

    @property
    def step_seconds(self) -> float:
        return statistics.mean(self.step_times)

    @property
    def mean_stall(self) -> float:
        return statistics.mean(self.stalls)

    @property
    def median_restart(self) -> float:
        return statistics.median(self.restarts)

    @property
    def mean_write(self) -> float:
        """Seconds from the end of a save's stall until it is durable."""
        begun = {(event.life, event.step): event.at for event in self._of("saved") if event.rank == 0}
        durable = {(event.life, event.step): event.at for event in self._of("durable")}
        return statistics.mean(max(0.0, durable[key] - begun[key]) for key in begun if key in durable)

    @property
    def counted(self) -> float:
        """Goodput in units of steps: useful / (executed + all waits, in steps of this very run).

        A busy machine makes steps and stalls longer alike, so this says what was lost rather than how busy it was.
        """
        waits = sum(self.stalls) + sum(self.restarts) + sum(self.cut)
        return self.useful / (self.executed + waits / self.step_seconds)

    @property
    def by_clock(self) -> float:
        """Goodput in seconds: useful steps, each as long as the mean step, of the wall clock."""
        return self.useful * self.step_seconds / self.wall

    def check_invariants(self) -> None:
        """Each life went on from the newest checkpoint that was durable, and no step is missing."""
        loaded = {event.life: event.step for event in self._of("loaded")}
        for life, began in loaded.items():
            steps = [event.step for event in self._of("step") if event.life == life]
            assert steps == list(range(began + 1, began + 1 + len(steps))), f"life {life} missed a step"
            seen = [event.step for event in self._of("durable") if event.life < life]
            assert began >= max(seen, default=0), f"life {life} began before a checkpoint that was durable"
        assert {event.step for event in self._of("step")} == set(range(1, self.useful + 1)), "a step was not taken"

    def _of(self, kind: str) -> list[DrillEvent]:
        return [event for event in self.events if event.kind == kind]
