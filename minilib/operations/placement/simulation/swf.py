"""Logs of parallel machines in the Standard Workload Format, as the Parallel Workloads Archive keeps them.

One job a line, 18 numbers, -1 for what is not known; lines that begin with a semicolon are comments, those at the
beginning with a colon the header. What a log calls a processor is a GPU here, or a part of one.

Source: https://www.cs.huji.ac.il/labs/parallel/workload/swf.html, version 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minilib.mechanisms.basics.checks import check_whole
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.simulation.traced_job import TracedJob

FIELDS = (
    "job number", "submit time", "wait time", "run time", "allocated processors", "average CPU time", "used memory",
    "requested processors", "requested time", "requested memory", "status", "user", "group", "executable", "queue",
    "partition", "preceding job", "think time",
)  # fmt: skip


class InvalidLog(ValueError):
    """A line that is not in the Standard Workload Format; the message says which, and what is wrong."""


class WrongFields(InvalidLog):
    """A line of other than 18 fields, or one that is no number."""


class OutOfOrder(InvalidLog):
    """A job that was submitted before the one on the line above, or a number that comes twice."""


@dataclass(frozen=True)
class WorkloadLog:
    """A log, read.

    Args:
        header: what the comments at its beginning say, by name, such as "MaxProcs".
        jobs: in order of arrival.
        skipped: jobs without a known run time or without processors: most were cancelled while they waited.
    """

    header: dict[str, str]
    jobs: list[TracedJob]
    skipped: int


def read_swf(path: Path | str, processors_per_gpu: int = 1, any_order: bool = False) -> WorkloadLog:
    """Read a log from a file; see `parse_swf`.

    Raises:
        InvalidLog: or a kind of it that says what is wrong.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        return parse_swf(lines, processors_per_gpu, any_order)


def parse_swf(lines: Iterable[str], processors_per_gpu: int = 1, any_order: bool = False) -> WorkloadLog:
    """Read a log.

    Args:
        lines: of it.
        processors_per_gpu: processors that stand for a GPU, rounded up.
        any_order: take lines that are not sorted by submit time, which the format asks for; jobs are sorted.

    Returns:
        Its jobs, as many GPUs as were allocated, or requested where that is not known; the estimate is the requested
        time, or the run time where none is known.

    Raises:
        InvalidLog: or a kind of it that says what is wrong.
        ValueError: if processors_per_gpu is no whole number ≥ 1.
    """
    check_whole("processors_per_gpu", processors_per_gpu, 1)
    header, jobs, skipped = {}, [], 0
    seen: set[int] = set()
    before = 0.0
    for at, line in enumerate(lines, 1):
        text = line.strip()
        if text.startswith(";"):
            name, colon, value = text[1:].partition(":")
            if colon and not seen:
                header[name.strip()] = value.strip()
            continue
        if not text:
            continue
        row = _row(text, at)
        if row["job number"] in seen:
            raise OutOfOrder(f"line {at}: job {row['job number']:g} comes twice; number each job once")
        if row["submit time"] < before and not any_order:
            raise OutOfOrder(
                f"line {at}: submitted at {row['submit time']:g}, after {before:g}: sort lines, or give any_order"
            )
        seen.add(row["job number"])
        before = row["submit time"]
        if (job := _job(row, processors_per_gpu)) is None:
            skipped += 1
        else:
            jobs.append(job)
    return WorkloadLog(header, sorted(jobs, key=lambda job: job.arrival), skipped)


def _row(text: str, at: int) -> dict[str, float]:
    words = text.split()
    if len(words) != len(FIELDS):
        raise WrongFields(f"line {at}: {len(words)} fields, and the format has {len(FIELDS)}; -1 stands for unknown")
    row = {}
    for name, word in zip(FIELDS, words, strict=True):
        try:
            row[name] = float(word) if "." in word or "e" in word.lower() else int(word)
        except ValueError:
            raise WrongFields(f"line {at}: {name} is a number, got {word!r}") from None
        if not math.isfinite(row[name]) or (row[name] < 0 and row[name] != -1):
            raise InvalidLog(f"line {at}: {name} is a finite number ≥ 0, or -1 if unknown; got {word!r}")
    if row["job number"] < 0 or row["submit time"] < 0:
        raise InvalidLog(f"line {at}: a job has a number and a submit time; both are needed, -1 is none")
    return row


def _job(row: dict[str, float], processors_per_gpu: int) -> TracedJob | None:
    processors = row["allocated processors"] if row["allocated processors"] > 0 else row["requested processors"]
    if processors <= 0 or row["run time"] < 0:
        return None
    estimate = row["requested time"] if row["requested time"] > 0 else max(row["run time"], 1)
    name = f"{row['job number']:g}"
    tenant = "" if row["user"] < 0 else f"user{row['user']:g}"
    job = GangJob(name, math.ceil(processors / processors_per_gpu), tenant=tenant, seconds=estimate)
    return TracedJob(job, row["submit time"], row["run time"])
