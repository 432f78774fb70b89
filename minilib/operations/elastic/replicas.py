"""Start replicas, lose some, bring them back: the others keep their processes, their memory and their steps.

    with Replicas(train, 3) as replicas:            train(replica) makes a trainer, and calls replica.train(trainer)
        replicas.wait_for(4)                        four steps are committed
        replicas.kill(1)                            0 and 2 repeat the step that they were in, and go on
        replicas.wait_for(8)
        replicas.start(1, awaited=True)             a new process gets the state of 0 or 2
        losses = replicas.values()
    replicas.lighthouse.committed                   which steps count, and who took them

This process is the coordinator: if it ends, replicas end by themselves.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Self

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.operations.elastic.lighthouse import Lighthouse
from minilib.operations.elastic.replica import ElasticReplica
from minilib.ranks.launch import RankFailed, RanksTimedOut
from minilib.ranks.launch.group import call, returned
from minilib.ranks.launch.local import END_TIMEOUT, STANDSTILL, START_TIMEOUT, server
from minilib.ranks.launch.pickling import dumps
from minilib.ranks.launch.process import RankProcess
from minilib.ranks.launch.rank import Job, Rank


@dataclass(frozen=True)
class ReplicaRank(Rank):
    """The process of a replica: a rank of no process group.

    Args:
        replica: number of the replica, of which this is one process; `rank` numbers processes.
        beat, timeout: see `ElasticReplica`.
    """

    replica: int
    beat: float
    timeout: float

    def _value(self, job: Job) -> bytes:
        self._prepare(job)
        fn, args = pickle.loads(job.call)
        with ElasticReplica(self.replica, Path(self.folder), self.beat, self.timeout) as replica:
            return call(fn, (replica, *args), self.rank, job.world_size)


class Replicas:
    """Processes that train together, each with the whole model. They are killed when the with block ends.

    Args:
        fn: called as `fn(replica, *args)` in each process; pickled as by `launch.run`.
        num_replicas: that begin.
        args: of `fn`.
        silence: seconds without a heartbeat after which a process is taken for lost.
        patience: seconds to wait for a majority, or for a process that lives and does nothing.
        timeout: seconds to wait for a member in a collective, if the coordinator does not tell sooner that it is lost.
        threads: torch's threads in each process.

    Attributes:
        lighthouse: who tells what was committed, voided, transferred.
        failures: of processes whose function raised or which died without being killed here, by replica.

    Raises:
        ValueError, TypeError: for wrong arguments.
    """

    def __init__(
        self,
        fn: Callable,
        num_replicas: int,
        *args,
        silence: float = 5.0,
        patience: float = 60.0,
        timeout: float = 60.0,
        threads: int = 1,
    ) -> None:
        check_whole("num_replicas", num_replicas, 1)
        for name, value in (("silence", silence), ("patience", patience), ("timeout", timeout)):
            check_quantity(name, value, above_zero=True)
        self._num_replicas, self._silence, self._patience, self._timeout = num_replicas, silence, patience, timeout
        sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
        self._job = Job(
            dumps((fn, args)), num_replicas, timeout, STANDSTILL, "gloo", threads, dict(os.environ), sources
        )
        self._processes: list[RankProcess] = []
        self._killed: set[int] = set()  # numbers of processes
        self.failures: dict[int, RankFailed] = {}

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="minilib-replicas-"))
            self._folder = Path(folder)
            (self._folder / "job").write_bytes(pickle.dumps(self._job))
            expected = frozenset(range(self._num_replicas))
            self.lighthouse = Lighthouse(self._folder / "lighthouse", expected, self._silence, self._patience)
            undo.callback(self.lighthouse.close)
            self._reports, self._report = os.pipe()
            undo.callback(os.close, self._reports)
            undo.callback(os.close, self._report)
            undo.callback(self._end)
            for replica in range(self._num_replicas):
                self.start(replica)
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def start(self, replica: int, awaited: bool = False) -> None:
        """Start a process of a replica, a new one or one that was lost; from its first quorum on it takes part.

        Args:
            replica: its number.
            awaited: let the others wait for it before their next step, at most for `patience`.

        Raises:
            RanksTimedOut: if the system does not start it.
        """
        check_whole("replica", replica)
        if awaited:
            self.lighthouse.expect(replica)
        rank = ReplicaRank(len(self._processes), str(self._folder), replica, self._silence / 5, self._timeout)
        process = RankProcess(rank, *server.start(rank, [self._report]))
        self._processes.append(process)
        if not self._until(lambda: process.pid is not None or process.ended, START_TIMEOUT):
            raise RanksTimedOut(f"the process of replica {replica} did not start", (replica,))

    def kill(self, replica: int) -> None:
        """End the newest process of a replica at once."""
        process = self._newest(replica)
        self._killed.add(process.rank.rank)
        process.kill()

    def pid(self, replica: int) -> int:
        """Of the newest process of a replica."""
        return self._newest(replica).pid

    def wait_for(self, step: int, timeout: float = 60.0) -> None:
        """Return once all steps before this one are committed.

        Raises:
            RankFailed: if all processes have ended before.
            RanksTimedOut: if that takes longer.
        """
        done = lambda: self.lighthouse.wait_for(step, 0.0) or not self._working()  # noqa: E731
        if not self._until(done, timeout):
            raise RanksTimedOut(f"step {step} was not reached within {timeout:g} s", ())
        if not self.lighthouse.wait_for(step, 0.0):
            raise self._failure()

    def values(self, timeout: float = 60.0) -> dict[int, object]:
        """What each replica's function returned, once all that are heard of have come to their end.

        Raises:
            RankFailed: if no replica came to its end; it holds the first failure.
            RanksTimedOut: if some are not done in time.
        """
        if not self._until(lambda: not self._working(), timeout):
            working = tuple(process.rank.replica for process in self._working())
            raise RanksTimedOut(f"replicas {working} had not returned after {timeout:g} s", working)
        done = [process for process in self._processes if process.report == "value"]
        if not done:
            raise self._failure()
        n = self._num_replicas
        return {each.rank.replica: returned(each.rank.file("value").read_bytes(), each.rank.rank, n) for each in done}

    def _newest(self, replica: int) -> RankProcess:
        found = [process for process in self._processes if process.rank.replica == replica]
        if not found:
            raise ValueError(f"replica {replica} was never started; started are {sorted(self._started())}")
        return found[-1]

    def _started(self) -> set[int]:
        return {process.rank.replica for process in self._processes}

    def _working(self) -> list[RankProcess]:
        """Processes to wait for: not those that are silent when the run is over."""
        running = [process for process in self._processes if not (process.ended or process.report)]
        over, is_silent = self.lighthouse.finished, self.lighthouse.is_silent
        return [process for process in running if not (over and is_silent(process.rank.replica))]

    def _failure(self) -> RankFailed:
        first = next(iter(self.failures.values()), None)
        return first or RankFailed("no replica came to the end of the run: all were killed", -1)

    def _until(self, condition: Callable[[], object], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._listen(0.02)
        return True

    def _listen(self, seconds: float) -> None:
        """Read what processes and the fork server report."""
        living = {process.status: process for process in self._processes if not process.ended}
        ready = connection.wait([self._reports, *living], seconds)
        if self._reports in ready:
            for line in os.read(self._reports, 65536).decode().splitlines():
                kind, number = line.split()
                process = self._processes[int(number)]
                process.report = kind
                if kind == "failure":
                    failure = pickle.loads(process.rank.file("failure").read_bytes())
                    self.failures.setdefault(process.rank.replica, failure)
        for process in (living[status] for status in ready if status != self._reports):
            process.read_status()
            number, replica = process.rank.rank, process.rank.replica
            if process.ended and not process.report and number not in self._killed:
                self.failures.setdefault(replica, RankFailed(f"replica {replica} {process.epitaph()}", replica))

    def _end(self) -> None:
        """Kill whatever still runs."""
        deadline = time.monotonic() + END_TIMEOUT
        while not all(process.ended for process in self._processes) and time.monotonic() < deadline:
            for process in self._processes:
                process.kill()
            self._listen(0.05)
        for process in self._processes:
            process.kill()  # children that it left
            os.close(process.status)
            os.close(process.pipe)
