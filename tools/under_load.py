"""Run a command beside bursts of load, as on a machine that others use: a process per core works and rests, at random.

Usage: python -m tools.under_load SEED COMMAND ...      such as: python -m tools.under_load 1 make test

Ends with the command's exit code. The bursts are those of the seed, and end with the command, however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, REST = (0.5, 4.0), (1.0, 6.0)  # seconds, from and to
LOOK_UP = 0.05  # seconds after which a process looks whether it is still wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, help="the same seed makes the same bursts")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    options = parser.parse_args()
    if not options.command:
        parser.error("say what to run beside the load")
    with load(options.seed):
        return subprocess.run(options.command).returncode


@contextlib.contextmanager
def load(seed: int) -> Iterator[list[subprocess.Popen]]:
    """A process per core that works and rests until the block ends, or this process does."""
    code = "import sys; from tools.under_load import worker; worker(*map(int, sys.argv[1:]))"
    words = [sys.executable, "-c", code]
    facts = [[str(seed), str(number), str(os.getpid())] for number in range(os.cpu_count() or 1)]
    workers = [subprocess.Popen([*words, *each], cwd=ROOT) for each in facts]
    try:
        yield workers
    finally:
        for process in workers:
            process.kill()
            process.wait()


def bursts(seed: int, number: int) -> Iterator[tuple[float, float]]:
    """Seconds of work and of rest of one process, without end."""
    chance = random.Random(f"{seed}, {number}")
    while True:
        yield chance.uniform(*WORK), chance.uniform(*REST)


def worker(seed: int, number: int, parent: int) -> None:
    """Work and rest by turns for as long as the parent lives."""
    for work, rest in bursts(seed, number):
        for seconds, at_work in ((work, True), (rest, False)):
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                if os.getppid() != parent:
                    return
                pause = time.monotonic() + LOOK_UP
                while at_work and time.monotonic() < pause:
                    pass
                if not at_work:
                    time.sleep(LOOK_UP)


if __name__ == "__main__":
    sys.exit(main())
