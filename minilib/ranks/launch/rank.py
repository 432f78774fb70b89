"""What happens inside a rank that `minilib.ranks.launch.local` started: join, call the function, hand over its value.

A rank and its starter share a folder, whose files are named below, and two pipes. Up the one go reports, one line
each ("value 3", "failure 1"); down the other comes a byte once all ranks have returned, or the pipe's end when the
starter is no more.
"""

from __future__ import annotations

import faulthandler
import linecache
import os
import pickle
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from minilib.ranks.launch.group import call, failure, join, leave

MARGIN = 60.0  # seconds that torch and the watchdog wait longer than the starter, who knows more of what went wrong


@dataclass(frozen=True)
class Job:
    """What all ranks are to do.

    Args:
        call: (fn, args), pickled by cloudpickle.
        world_size: number of ranks.
        timeout: seconds that the starter waits for the last of them to return.
        backend: of torch.distributed.
        threads: torch's threads per rank.
        environment: the starter's os.environ; the fork server's own may be older.
        sources: linecache entries of what is no file, such as notebook cells, so that tracebacks show their lines.
    """

    call: bytes
    world_size: int
    timeout: float
    backend: str
    threads: int
    environment: dict[str, str]
    sources: dict[str, tuple]


@dataclass(frozen=True)
class Rank:
    """One rank. Multiprocessing's fork server unpickles it in a fresh fork and calls `_bootstrap`, no more.

    Args:
        rank: its number.
        folder: where the job lies, and where the rank writes its files.
    """

    rank: int
    folder: str

    def file(self, kind: str) -> Path:
        """What the rank writes: "out" and "err" (what it prints), "stack", and at last "value" or "failure"."""
        return Path(self.folder) / f"{self.rank}.{kind}"

    def _bootstrap(self, starter: int) -> None:
        os.setsid()  # a process group of its own: its children die with it, and ^C in a terminal does not reach it
        all_returned = threading.Event()
        threading.Thread(target=self._listen, args=(starter, all_returned), daemon=True).start()
        try:
            job = pickle.loads((Path(self.folder) / "job").read_bytes())
            self._redirect()
            stack = self.file("stack").open("w")
        except FileNotFoundError:  # the starter gave up and took the folder away
            os._exit(1)
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        # The last resort, should the starter be gone and this process never let the listening thread run.
        faulthandler.dump_traceback_later(job.timeout + MARGIN, exit=True, file=stack)
        try:
            kind, content = "value", self._value(job)
        except BaseException as error:
            kind, content = "failure", pickle.dumps(failure(error, self.rank, job.world_size))
        sys.stdout.flush()
        sys.stderr.flush()
        self.file(kind).write_bytes(content)
        [reports] = forkserver.get_inherited_fds()
        os.write(reports, f"{kind} {self.rank}\n".encode())
        # A rank that ends breaks the connections of those that still run. So one that has returned waits for the
        # others, and one that has failed waits to be killed: then no other failure can come of its own.
        all_returned.wait()
        leave()
        os._exit(0)  # and nothing more: what runs at a normal exit can abort a process that has done its work

    def _value(self, job: Job) -> bytes:
        linecache.cache.update(job.sources)
        os.environ.clear()
        os.environ.update(job.environment)
        os.environ.update({"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "GROUP_RANK": "0"})
        os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job.world_size)))

        import numpy
        import torch
        import torch.distributed as dist

        torch.seed()  # forks of one process would all draw the same numbers
        numpy.random.seed()
        torch.set_num_threads(job.threads)
        store = dist.FileStore(str(Path(self.folder) / "rendezvous"), job.world_size)
        join(job.backend, job.timeout + MARGIN, store=store, rank=self.rank, world_size=job.world_size)
        fn, args = pickle.loads(job.call)
        return call(fn, args, self.rank, job.world_size)

    def _redirect(self) -> None:
        """Send what the process prints, from Python or not, to its files; give it nothing to read."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.file(kind), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        # Line by line: what was printed before a crash may explain it.
        text = {"buffering": 1, "encoding": "utf-8", "errors": "replace", "closefd": False}
        sys.stdout, sys.stderr = open(1, "w", **text), open(2, "w", **text)  # noqa: SIM115

    def _listen(self, starter: int, all_returned: threading.Event) -> None:
        """Wait for the starter's byte; at the pipe's end, clean up in its place and kill this rank and its children."""
        if os.read(starter, 1):
            all_returned.set()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
