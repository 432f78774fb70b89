"""A rank's process: join the group, call the function, hand its value to the process that called `run` (the starter).

The starter makes a folder for the call, whose files `Rank.file` names, and two kinds of pipe. Ranks write their reports
into one that they share, a line each ("value 3", "failure 1"). Each rank reads another: the starter writes a byte into
it once all ranks have returned, and it ends when the starter ends.
"""

from __future__ import annotations

import faulthandler
import linecache
import os
import pickle
import select
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from minilib.ranks.launch.fork_server import inherited_fds
from minilib.ranks.launch.group import call, failure, join, leave


@dataclass(frozen=True)
class Job:
    """The call that all ranks make.

    Args:
        call: (fn, args), pickled by cloudpickle.
        world_size: number of ranks.
        collective_timeout: seconds that a collective may take.
        standstill: seconds after which a rank ends itself if none of its Python threads gets a turn.
        backend: of torch.distributed.
        threads: torch's threads per rank.
        environment: os.environ of the starter when it called `run`.
        sources: the starter's linecache entries of code that is in no file, such as notebook cells, for tracebacks.
    """

    call: bytes
    world_size: int
    collective_timeout: float
    standstill: float
    backend: str
    threads: int
    environment: dict[str, str]
    sources: dict[str, tuple]


@dataclass(frozen=True)
class Rank:
    """One rank: the fork server unpickles it in a new process and calls `_bootstrap`.

    Args:
        rank: number of the rank.
        folder: path of the folder with the file "job", into which the rank writes its own files.
    """

    rank: int
    folder: str

    def file(self, kind: str) -> Path:
        """Path of a file that the rank writes: "out" and "err" (what it prints), "stack", then "value" or "failure"."""
        return Path(self.folder) / f"{self.rank}.{kind}"

    def _bootstrap(self, starter: int) -> None:
        os.setsid()  # a process group of its own: its children die with it, and ^C in a terminal does not reach it
        try:
            job = pickle.loads((Path(self.folder) / "job").read_bytes())
            self._redirect()
            stack = self.file("stack").open("w")
        except FileNotFoundError:  # the starter gave up and took the folder away
            os._exit(1)
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        all_returned = threading.Event()
        listener = threading.Thread(
            target=self._listen, args=(starter, all_returned, job.standstill, stack), daemon=True
        )
        listener.start()
        try:
            kind, content = "value", self._value(job)
        except BaseException as error:
            kind, content = "failure", pickle.dumps(failure(error, self.rank, job.world_size))
        sys.stdout.flush()
        sys.stderr.flush()
        self.file(kind).write_bytes(content)
        [reports] = inherited_fds()
        os.write(reports, f"{kind} {self.rank}\n".encode())
        # A rank that ends breaks the connections of those that still run. So a rank that has returned waits for the
        # others, and a rank that has failed waits to be killed: then no failure is the consequence of another.
        all_returned.wait()
        # Gloo takes 0.05 s to destroy a group of 4 and has nothing to save; NCCL may have work in flight between GPUs.
        if job.backend != "gloo":
            leave()
        os._exit(0)  # without what runs at a normal exit, which can abort a process whose gloo threads live

    def _value(self, job: Job) -> bytes:
        self._prepare(job)

        import torch.distributed as dist

        store = dist.FileStore(str(Path(self.folder) / "rendezvous"), job.world_size)
        join(job.backend, job.collective_timeout, store=store, rank=self.rank, world_size=job.world_size)
        fn, args = pickle.loads(job.call)
        return call(fn, args, self.rank, job.world_size)

    def _prepare(self, job: Job) -> None:
        """Take over the starter's environment, seed generators, and use no more threads than the job allows."""
        linecache.cache.update(job.sources)
        os.environ.clear()
        os.environ.update(job.environment)
        os.environ.update({"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "GROUP_RANK": "0"})
        os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job.world_size)))

        import numpy
        import torch

        torch.seed()  # forks of one process would all draw the same numbers
        numpy.random.seed()
        torch.set_num_threads(job.threads)

    def _redirect(self) -> None:
        """Send what the process prints, from Python or not, to its files; give it nothing to read."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.file(kind), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        # Line by line: what was printed before a crash may explain it.
        text = {"buffering": 1, "encoding": "utf-8", "errors": "replace", "closefd": False}
        sys.stdout, sys.stderr = open(1, "w", **text), open(2, "w", **text)  # noqa: SIM115

    def _listen(self, starter: int, all_returned: threading.Event, standstill: float, stack: TextIO) -> None:
        """Wait for the starter's byte; if the pipe ends instead, delete the folder, kill this rank and its children.

        C code that holds the interpreter's lock keeps this thread from noticing that the starter has ended: the process
        exits after `standstill` seconds without a turn for this thread.
        """
        while True:
            faulthandler.dump_traceback_later(standstill, exit=True, file=stack)
            if select.select([starter], [], [], standstill / 2)[0]:
                break
        if os.read(starter, 1):
            all_returned.set()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
