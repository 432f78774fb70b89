"""Run everything that must hold: ruff, unit and grader tests, nbval on every chapter and solution.

Usage: python tools/test.py [--only ruff|unit|interpreter|solutions|chapters] [--beside-load SEED]

--beside-load keeps the cores busy in bursts meanwhile, as a neighbour would: all must hold then, too, or be skipped.

Ends with what was skipped and why, and one line of totals.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from tools import under_load
from tools.chapters import CELL_TIMEOUT, notebooks

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("unit", "interpreter", "solutions", "chapters")
# The unit tests often wait, for ranks and for timeouts, and leave the cores to others meanwhile.
TOGETHER = (("ruff",), ("unit", "interpreter"), ("solutions",), ("chapters",))
# Triton decides at import whether it interprets. What solutions say is counted, and tiny tensors need no threads.
VARIABLES = {"interpreter": {"TRITON_INTERPRET": "1"}, "solutions": {"OMP_NUM_THREADS": "1"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ruff", *PARTS), help="run one part")
    parser.add_argument("--beside-load", type=int, metavar="SEED", help="run beside bursts of load")
    options = parser.parse_args()
    only = options.only
    # a shell ignores Ctrl-C for what it starts in the background, and what tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    beside = under_load.load(options.beside_load) if options.beside_load is not None else contextlib.nullcontext()
    with beside, tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder) / f"{name}.xml" for name in PARTS}
        parts = {name: command for name, command in _parts(reports).items() if only in (None, name)}
        groups = [{name: parts[name] for name in names if name in parts} for names in TOGETHER]
        failed = [name for group in groups if group for name in _run(group)]
        counts, skips = _read([path for path in reports.values() if path.is_file()])
    print("\n── skipped, and why " + "─" * 40)
    print("\n".join(skips) or "nothing")
    print("─" * 60)
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if failed else 0


def _parts(reports: dict[str, Path]) -> dict[str, list[str]]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    books = ["--nbval", f"--nbval-cell-timeout={CELL_TIMEOUT}", "--nbval-current-env", "--timeout=600"]
    chapters, solutions = (
        [str(path.relative_to(ROOT)) for path in notebooks() if path.is_relative_to(ROOT / folder)]
        for folder in ("chapters", "solutions")
    )
    return {
        "ruff": [sys.executable, "-m", "ruff", "check", "--quiet", "."],
        # on two cores three workers took 353 s where two took 410
        "unit": [
            *[*pytest, "-n", "3", "--dist", "worksteal", f"--junitxml={reports['unit']}"],
            *["--ignore=tests/interpreter", "tests"],
        ],
        "interpreter": [*pytest, f"--junitxml={reports['interpreter']}", "tests/interpreter"],
        # what solutions say is counted, so two may run at a time
        "solutions": [*pytest, "-n", "2", "--dist=loadfile", *books, f"--junitxml={reports['solutions']}", *solutions],
        # two chapters that measure at once would measure each other
        "chapters": [*pytest, *books, f"--junitxml={reports['chapters']}", *chapters],
    }


def _run(commands: dict[str, list[str]]) -> list[str]:
    """Run parts at the same time, and return the names of those that failed.

    The first one prints as it goes, the others when all before them have ended.
    """
    failed, started = [], time.perf_counter()
    with contextlib.ExitStack() as stack:
        logs = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in list(commands)[1:]}
        _print_title(next(iter(commands)))
        running = {}
        for name, command in commands.items():
            log = logs.get(name)
            running[name] = subprocess.Popen(command, cwd=ROOT, env=_environment(name), stdout=log, stderr=log)
            stack.callback(_end, running[name])
        for name, process in running.items():
            ok = process.wait() == 0
            if name in logs:
                _print_title(name)
                logs[name].seek(0)
                print(logs[name].read(), end="")
            print(f"{name}: {'ok' if ok else 'FAILED'} after {time.perf_counter() - started:.0f} s", flush=True)
            failed += [] if ok else [name]
    return failed


def _print_title(name: str) -> None:
    print(f"── {name} " + "─" * (60 - len(name)), flush=True)


def _end(process: subprocess.Popen) -> None:
    """Leave a part that Ctrl-C has reached, too, the time to end by itself."""
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


def _environment(name: str) -> dict[str, str]:
    environment = {**os.environ, **VARIABLES.get(name, {})}
    # ranks, kernels and scripts are processes of their own: without stored bytecode each would compile minilib anew
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _read(reports: list[Path]) -> tuple[dict[str, int], list[str]]:
    """Totals over all reports, and a line for the tests that one file skipped for one reason."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    skips: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            skip = case.find("skipped")
            if skip is not None:
                counts["skipped"] += 1
                skips[case.get("classname"), skip.get("message")] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                counts["failed"] += 1
            else:
                counts["passed"] += 1
    return counts, [f"SKIPPED {number} in {where}: {why}" for (where, why), number in sorted(skips.items())]


if __name__ == "__main__":
    sys.exit(main())
