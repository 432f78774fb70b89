"""All-reduce by MPI, for tools/bench/collectives.py; needs mpi4py, and nothing of this library.

Usage: mpirun -n N python mpi_all_reduce.py BYTES:CALLS …      so many calls a turn, one after another

Rank 0 prints JSON: MPI's version, and for each size the seconds of every turn on its slowest rank.
"""

import json
import sys
import time

import numpy as np
from mpi4py import MPI

TURNS = 12

comm, found = MPI.COMM_WORLD, {}
for size in sys.argv[1:]:
    nbytes, times = map(int, size.split(":"))
    x, taken = np.zeros(nbytes // 4, dtype=np.float32), []
    for _ in range(TURNS + 1):
        comm.Barrier()
        started = time.perf_counter()
        for _ in range(times):
            comm.Allreduce(MPI.IN_PLACE, x)
        taken.append((time.perf_counter() - started) / times)
    found[nbytes] = [max(turn) for turn in zip(*comm.allgather(taken), strict=True)][1:]  # the first turn warms up
if comm.rank == 0:
    print(json.dumps({"version": MPI.Get_library_version().split(",")[0], "seconds": found}))
