"""Under torchrun --max-restarts: train with the faults of each attempt; each rank writes what it has at the end.

Usage: torchrun … under_torchrun.py FOLDER FAULTS      JSON, {attempt: [rank, step, moment, count, how]}
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from minilib.operations.elastic import restart_count
from minilib.ranks.launch import RankFailed, run
from tests.operations.elastic.runs import Fault, trains

folder, faults = Path(sys.argv[1]), {int(number): Fault(*fault) for number, fault in json.loads(sys.argv[2]).items()}
if restart_count() and os.environ["RANK"] == "0":
    time.sleep(2)  # rank 1 looks for rank 0 meanwhile, and must not find the address of the attempt before
try:
    values = run(trains, None, str(folder), faults, timeout=60)
except RankFailed as error:
    (folder / f"failure-{restart_count()}").write_text(f"{error.rank} {str(error).splitlines()[-1]}")
    raise
for rank, value in enumerate(values):
    torch.save(value, folder / f"{rank}.pt")
