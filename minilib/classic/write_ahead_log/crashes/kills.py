"""SIGKILL by chance: a process writes to a store and is killed, and the store is held against what the process told.

A kill never loses what the kernel has, so this says nothing about power cuts (power_cuts.py does). It says that the
real store recovers from wherever it was broken off: half a write, between rename and fsync, amid a snapshot.
"""

from __future__ import annotations

import contextlib
import random
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minilib.classic.write_ahead_log.crashes.victim import ACKNOWLEDGED, MAX_GROUP, nth_change, open_victim
from minilib.mechanisms.basics.child import child_environment

VICTIM = "minilib.classic.write_ahead_log.crashes.victim"
TIMEOUT = 60.0  # seconds until a victim must have acknowledged something
MAX_ACKS = 24  # acknowledgements that a victim may give before it is killed
MAX_DELAY = 0.004  # seconds from the last of these to the kill


@dataclass(frozen=True)
class KillTally:
    """What was found after all kills of one store.

    Args:
        kills: processes killed.
        acknowledged: records that they had told of, all together.
        recovered: records in the store at the end.
        lost: kills after which a record was missing that had been told of.
        torn: kills after which the store held what it never had.
        unasked: kills after which records were there that nobody had been told of; they may be.
    """

    kills: int
    acknowledged: int
    recovered: int
    lost: int
    torn: int
    unasked: int


def kill_rounds(kind: str, folder: Path, num_kills: int, seed: int = 0) -> KillTally:
    """Let processes write to one store, kill each, and look at the store after each kill.

    Args:
        kind: one of `victim.KINDS`.
        folder: an empty one.
        num_kills: how many.
        seed: of what is written and of when they are killed.

    Raises:
        RuntimeError: if a process ends by itself, or tells of nothing in time.
    """
    rng, values, number = random.Random(seed), {}, 0
    acknowledged = lost = torn = unasked = 0
    for _ in range(num_kills):
        told = max(number, _killed(kind, folder, seed, rng.randint(1, MAX_ACKS), rng.random() * MAX_DELAY))
        acknowledged += told - number
        store = open_victim(kind, folder)
        try:
            store.check_invariants()
            found, held = store.num_acknowledged, dict(store.items())
        finally:
            store.close()
        for record in range(number, found):
            key, value = nth_change(seed, record)
            values.pop(key, None)
            if value is not None:
                values[key] = value
        lost += found < told
        torn += held != values or found > told + MAX_GROUP
        unasked += found > told
        number = found
    return KillTally(num_kills, acknowledged, number, lost, torn, unasked)


def _killed(kind: str, folder: Path, seed: int, num_acks: int, delay: float) -> int:
    """Start a process, kill it a while after it has told so often; returns the last number that it told."""
    command = [
        sys.executable,
        "-P",
        "-m",
        VICTIM,
        kind,
        str(folder),
        str(seed),
    ]
    victim = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=child_environment()
    )
    told = b""
    with victim:
        try:
            while len(told) < num_acks * ACKNOWLEDGED.size:
                if not select.select([victim.stdout], [], [], TIMEOUT)[0]:
                    raise RuntimeError(f"the process told of nothing within {TIMEOUT:g} s")
                piece = victim.stdout.read(1 << 12)
                if not piece:
                    raise RuntimeError(f"the process ended by itself: {victim.stderr.read().decode(errors='replace')}")
                told += piece
            time.sleep(delay)
        finally:
            with contextlib.suppress(ProcessLookupError):
                victim.kill()
        told += victim.stdout.read() or b""
    whole = len(told) // ACKNOWLEDGED.size * ACKNOWLEDGED.size
    return ACKNOWLEDGED.unpack(told[whole - ACKNOWLEDGED.size : whole])[0]
