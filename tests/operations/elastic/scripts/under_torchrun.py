"""Under torchrun --max-restarts: train with the faults of each attempt; each rank writes what it has at the end.

Usage: torchrun … under_torchrun.py FOLDER FAULTS      JSON, {attempt: [rank, step, moment, count, how]}
"""

import json
import sys
from pathlib import Path

import torch

from minilib.operations.elastic import restart_count
from minilib.ranks.launch import RankFailed, run
from tests.operations.elastic.runs import Fault, trains

folder, faults = Path(sys.argv[1]), {int(number): Fault(*fault) for number, fault in json.loads(sys.argv[2]).items()}
try:
    values = run(trains, None, str(folder), faults, timeout=60)
except RankFailed as error:
    (folder / f"failure-{restart_count()}").write_text(f"{error.rank} {str(error).splitlines()[-1]}")
    raise
for rank, value in enumerate(values):
    torch.save(value, folder / f"{rank}.pt")
