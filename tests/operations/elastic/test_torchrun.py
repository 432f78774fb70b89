"""The same training function under torchrun --max-restarts, whose ranks are killed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from minilib.mechanisms.basics.child import child_environment
from minilib.operations.elastic import ElasticAttempt
from minilib.ranks.launch import run
from tests.operations.elastic.runs import Fault, check_each_window_once, counted_windows, trains

SCRIPT = Path(__file__).parent / "scripts/under_torchrun.py"


def torchrun(folder: Path, faults: dict[int, Fault], max_restarts: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               f"--max-restarts={max_restarts}", str(SCRIPT), str(folder), json.dumps(faults)]  # fmt: skip
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=280)


def test_killed_and_raising_ranks_are_begun_again_and_come_to_the_same_end(tmp_path):
    folder, plain = tmp_path / "torchrun", tmp_path / "plain"
    folder.mkdir()
    plain.mkdir()
    faults = {
        0: Fault(1, 4, "forward", how="raise"),
        1: Fault(0, 7, "forward", how="raise"),
        2: Fault(1, 8, "collective", 1),
    }
    done = torchrun(folder, faults, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = run(trains, 2, str(plain), {}, timeout=120)
    for rank in (0, 1):
        found = torch.load(folder / f"{rank}.pt", weights_only=False)
        assert (found["losses"], found["validation"]) == (expected[rank]["losses"], expected[rank]["validation"])
        torch.testing.assert_close(found["model"], expected[rank]["model"], rtol=0, atol=0)
        assert not psutil.pid_exists(found["pid"])
    # torchrun's store outlives its attempts: each one's failure is told, and not that of the attempt before.
    assert (folder / "failure-0").read_text() == "1 ValueError: a bad batch in step 4"
    assert (folder / "failure-1").read_text() == "0 ValueError: a bad batch in step 7"
    check_each_window_once(counted_windows(folder, attempts_in(folder)))


def attempts_in(folder: Path) -> tuple[ElasticAttempt, ...]:
    """As the ledgers tell: torchrun tells nothing to the steps."""
    numbers = sorted({int(re.match(r"ledger-(\d+)", path.name)[1]) for path in folder.glob("ledger-*")})
    firsts = [json.loads((folder / f"ledger-{n}-1").read_text().splitlines()[0])[0] for n in numbers]
    return tuple(ElasticAttempt(n, 2, first, None, "", (), "", 0.0) for n, first in zip(numbers, firsts, strict=True))
