"""A job that outlasts its ranks: when one is lost all begin again, from the newest checkpoint, perhaps with fewer.

    run_elastic(train, 4, folder, spares=1, min_ranks=2)

    attempt   ranks   from step   reached   failed            next
    0         4       0           17        rank 2 killed     a spare takes the place: 4 ranks
    1         4       15          31        rank 0 hung       no spare is left: 3 ranks
    2         3       30          50        —                 done

A step that fails again and again is no accident: the job ends by name, instead of restarting for ever.

In production: torchrun --max-restarts; TorchElastic, Ray Train, Kubernetes' JobSet.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from minilib.mechanisms.basics.checks import check_whole
from minilib.operations.elastic.progress import ProgressFile, RankProgress, Reporter, Standing, reporter
from minilib.ranks.launch import RankFailed, RanksTimedOut, run

KILLED, RAISED, HUNG = "killed", "raised", "hung"


@dataclass(frozen=True)
class ElasticAttempt:
    """One start of the job.

    Args:
        number: from 0.
        ranks: how many there were.
        from_step: from which they went on; None if no rank reported a step.
        reached: the farthest step that a rank reported.
        kind: "killed", "raised" or "hung"; empty if all ranks returned.
        failed: the ranks that did so; empty if it is not known which.
        reason: what is known, a line.
        seconds: from start to end.
    """

    number: int
    ranks: int
    from_step: int | None
    reached: int | None
    kind: str
    failed: tuple[int, ...]
    reason: str
    seconds: float


@dataclass(frozen=True)
class ElasticRun:
    """A job that has come to its end.

    Args:
        values: what each rank of the last attempt returned.
        attempts: all of them, the last one without a failure.
    """

    values: list
    attempts: tuple[ElasticAttempt, ...]


class ElasticFailed(RuntimeError):
    """The job did not come to its end; `attempts` tells what happened, and the last failure is this error's cause.

    Args:
        message: why nothing is tried any more.
        attempts: all of them.
    """

    def __init__(self, message: str, attempts: Sequence[ElasticAttempt]) -> None:
        super().__init__(message, attempts)
        self.attempts = tuple(attempts)

    def __str__(self) -> str:
        return self.args[0]


class RestartsExhausted(ElasticFailed):
    """Ranks failed more often than the job may begin again."""


class NoProgress(ElasticFailed):
    """Attempts fail at the same step, one after the other: a batch or an error that no restart mends."""


class TooFewRanks(ElasticFailed):
    """Fewer ranks are left than the job can run on."""


def run_elastic(
    fn: Callable,
    world_size: int,
    *args,
    min_ranks: int | None = None,
    spares: int | None = None,
    allowed: Collection[int] | None = None,
    max_restarts: int = 3,
    patience: int = 3,
    timeout: float | None = None,
) -> ElasticRun:
    """Run `fn(*args)` on ranks as `launch.run` does; if a rank is killed, raises or hangs, all ranks begin again.

    Each rank goes on from the newest checkpoint by itself, and calls `report_step`: `resume_and_train` does both. A
    rank that hangs is found by the others' communicator, whose timeout therefore decides how long they wait in vain.

    Args:
        fn: called on every rank of every attempt.
        world_size: ranks of the first attempt.
        args: of `fn`.
        min_ranks: fewest ranks to go on with; `world_size` if left out.
        spares: ranks that can be replaced; after that each failure takes one rank away. None for as many as needed.
        allowed: numbers of ranks on which `fn` can run; any if left out.
        max_restarts: how often the job may begin again.
        patience: attempts in a row that may fail at the same step from the same checkpoint.
        timeout: seconds that one attempt may take; None for no limit.

    Raises:
        RestartsExhausted, NoProgress, TooFewRanks: see there; each holds all attempts.
        ValueError: if an argument is out of range. So does `launch.run`, whose errors before ranks start pass through.
        KeyboardInterrupt: if the user interrupts; nothing is tried again, and no rank is left.

    Cost: a failure costs the steps since the checkpoint, the time until it is noticed (the communicator's timeout if a
        rank hangs), and a start.
    """
    least = world_size if min_ranks is None else min_ranks
    for name, value in (("world_size", world_size), ("min_ranks", least), ("patience", patience)):
        check_whole(name, value, 1)
    for name, value in (("max_restarts", max_restarts), ("spares", 0 if spares is None else spares)):
        check_whole(name, value)
    if least > world_size:
        raise ValueError(f"min_ranks is {least}, and the job begins with {world_size} rank(s), never with fewer")
    if allowed is not None and world_size not in allowed:
        raise ValueError(f"the job begins with {world_size} rank(s), and allowed numbers of them are {sorted(allowed)}")
    left, attempts = math.inf if spares is None else spares, []
    while True:
        attempt, outcome = _attempt(len(attempts), fn, world_size, args, timeout)
        attempts.append(attempt)
        if not attempt.kind:
            return ElasticRun(outcome, tuple(attempts))
        _check_worth_another(attempts, max_restarts, patience, outcome)
        lost = max(1, len(attempt.failed))
        replaced = min(lost, left)
        left -= replaced
        world_size = _fewer(world_size - (lost - replaced), least, allowed, attempts, outcome)


def _attempt(
    number: int, fn: Callable, ranks: int, args: tuple, timeout: float | None
) -> tuple[ElasticAttempt, list | Exception]:
    """One start of the job: what came of it, and the ranks' values or the failure."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minilib-elastic-", ignore_cleanup_errors=True) as folder:
        file = ProgressFile(Path(folder) / "progress")
        try:
            outcome = run(_reporting, ranks, file, number, fn, args, timeout=timeout)
        except (RankFailed, RanksTimedOut) as error:
            outcome = error
        rows = file.read(ranks)
    kind, failed = _cause(outcome, rows) if isinstance(outcome, Exception) else ("", ())
    steps = [row[:2] for row in rows if row.first_step is not None]
    from_step, reached = min((first for first, _ in steps), default=None), max((new for _, new in steps), default=None)
    reason = _line_of(outcome, kind) if kind else ""
    return ElasticAttempt(number, ranks, from_step, reached, kind, failed, reason, time.monotonic() - began), outcome


def _reporting(file: ProgressFile, number: int, fn: Callable, args: tuple) -> object:
    """On a rank: call the function, whose steps and end are told to the launcher."""
    reporter.set(Reporter(file, int(os.environ["RANK"]), number))
    return reporter.get().call(fn, args)


def _cause(error: RankFailed | RanksTimedOut, rows: Sequence[RankProgress]) -> tuple[str, tuple[int, ...]]:
    """What failed first, and on which ranks: a rank that waits in vain tells of it, and names only its neighbour."""
    if isinstance(error, RanksTimedOut):
        raised = [rank for rank, row in enumerate(rows) if row.standing == Standing.RAISED]
        return (RAISED, tuple(raised)) if raised else (HUNG, _in(Standing.RUNNING, rows))
    if rows[error.rank].standing == Standing.RUNNING:
        return KILLED, (error.rank,)
    if rows[error.rank].standing == Standing.WAITED_IN_VAIN:
        if raised := _in(Standing.RAISED, rows):
            return RAISED, raised
        if silent := _in(Standing.RUNNING, rows):
            return HUNG, silent
    return RAISED, (error.rank,)


def _line_of(error: Exception, kind: str) -> str:
    """The line that says most: a traceback's last one."""
    told_by_launcher = kind == KILLED or isinstance(error, RanksTimedOut)
    return str(error).rstrip().splitlines()[0 if told_by_launcher else -1]


def _in(standing: Standing, rows: Sequence[RankProgress]) -> tuple[int, ...]:
    return tuple(rank for rank, row in enumerate(rows) if row.standing == standing)


def _check_worth_another(
    attempts: Sequence[ElasticAttempt], max_restarts: int, patience: int, error: Exception
) -> None:
    """Raise unless the job may begin again, and there is hope that it comes further."""
    last = attempts[-1]
    alike = [(each.from_step, each.reached) == (last.from_step, last.reached) for each in attempts[-patience:]]
    if len(alike) == patience and all(alike):
        where = (
            "before its first step" if last.reached is None else f"at step {last.reached}, from step {last.from_step}"
        )
        raise NoProgress(
            f"{patience} attempts in a row failed {where}, the last one since {_said(last)}: look at this step's batch "
            "and at this error; a restart does not mend them",
            attempts,
        ) from error
    if len(attempts) > max_restarts:
        raise RestartsExhausted(
            f"the job began again {max_restarts} times, and failed once more: {_said(last)}", attempts
        ) from error


def _fewer(
    most: int, least: int, allowed: Collection[int] | None, attempts: Sequence[ElasticAttempt], error: Exception
) -> int:
    """The largest allowed number of ranks."""
    found = max((n for n in range(least, most + 1) if allowed is None or n in allowed), default=None)
    if found is None:
        numbers = "" if allowed is None else f" and a number in {sorted(allowed)}"
        raise TooFewRanks(
            f"{most} ranks are left, and the job needs {least} or more{numbers}; the last one was lost since "
            f"{_said(attempts[-1])}",
            attempts,
        ) from error
    return found


def _said(attempt: ElasticAttempt) -> str:
    ranks = ", ".join(map(str, attempt.failed)) or "unknown"
    return f"rank {ranks} {attempt.kind} ({attempt.reason})"
