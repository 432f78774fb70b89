"""Six runs of the drills as their step records alone: which fault belongs to which?

    traces = unnamed_traces()
    traces["A"][3][2].phases["forward"].cpu_ns        trace A, its fourth step, rank 2

Each has one of the six faults that step records show (TRACED), in an order that is not told.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

from minilib.operations.diagnosis.step_record import StepRecord, in_step
from minilib.operations.drills.training.drill import run_drill
from minilib.operations.drills.training.fault import drawn_fault

TRACED = (
    "desynchronised_replica",
    "flipped_bit",
    "memory_leak",
    "nan_from_one_rank",
    "slow_rank",
    "starved_loader",
)
LETTERS = "ABCDEF"
STORED = Path(__file__).with_name("traces.jsonl.gz")

StepTrace = Sequence[tuple[StepRecord, ...]]


def unnamed_traces(path: Path = STORED) -> dict[str, StepTrace]:
    """By letter, for each step the records of ranks 0, 1, …

    Raises:
        ValueError: if the file holds something else.
    """
    runs: dict[str, list[list[StepRecord]]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        letter, _, record = line.partition(" ")
        if letter not in LETTERS or not record:
            raise ValueError(f"{path.name} holds lines of a letter and a step record; got {line[:40]!r}")
        found = StepRecord.unpacked(record)
        ranks = runs.setdefault(letter, [])
        ranks.extend([] for _ in range(found.rank + 1 - len(ranks)))
        ranks[found.rank].append(found)
    return {letter: in_step(ranks) for letter, ranks in sorted(runs.items())}


def record_traces(seed: int, path: Path = STORED) -> list[str]:
    """Run the six drills anew and write their records.

    Args:
        seed: of the faults and of their order.
        path: of the file.

    Returns:
        The kinds, in the order of the letters.
    """
    chance = random.Random(seed)
    kinds = chance.sample(TRACED, len(TRACED))
    lines = []
    for letter, kind in zip(LETTERS, kinds, strict=True):
        steps = run_drill(drawn_fault(kind, chance)).steps
        lines += [f"{letter} {record.packed()}\n" for records in steps for record in records]
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return kinds
