"""A supervisor's process (init.py), seen from the parent: started, listened to until a deadline, ended for sure."""

from __future__ import annotations

import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from typing import Any

from minilib.classic.container.errors import CannotContain, ContainerLost, NotStarted
from minilib.classic.container.init import FORGET, KILL, ContainerSpec, supervise_as_told
from minilib.mechanisms.basics.child import child_environment

_SUPERVISOR = f"from {supervise_as_told.__module__} import {supervise_as_told.__name__}; {supervise_as_told.__name__}()"
_MOST_OUTPUT = 1 << 20  # bytes of output that are kept
_PATIENCE = 60.0  # seconds for a supervisor to start, and to end
_LONGEST = 86_400.0  # seconds that poll waits at a time; it counts milliseconds in 31 bits


class SupervisedProcess:
    """A container's processes. It runs when this has been made, and `end` ends it.

    Args:
        spec: what to run.
        timeout: seconds from the beginning of its work until it is killed.

    Attributes:
        pid: number of its first process, as the host sees it.
        timed_out: whether it was killed because its time was over.

    Raises:
        CannotContain: if the kernel refuses a part of it.
        NotStarted: if it dies before the first line of its work.
    """

    def __init__(self, spec: ContainerSpec, timeout: float) -> None:
        self._deadline = time.monotonic() + _PATIENCE
        self.pid, self.timed_out, self._unread = 0, False, b""
        self._status: int | None = None
        with ExitStack() as stack:
            self._output, self._value, given = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            pickle.dump(spec, given)
            given.seek(0)
            self._events, theirs = os.pipe()
            stack.callback(os.close, self._events)
            self._poll = select.poll()
            self._poll.register(self._events, select.POLLIN)
            fds = given.fileno(), self._value.fileno(), theirs
            try:
                self._supervisor = subprocess.Popen(
                    [sys.executable, "-c", _SUPERVISOR, *map(str, fds)],
                    stdin=subprocess.PIPE,
                    stdout=self._output,
                    stderr=self._output,
                    bufsize=0,
                    env=child_environment(),
                    pass_fds=fds,
                    start_new_session=True,  # Ctrl-C interrupts us, and we end it
                )
            finally:
                os.close(theirs)
            stack.callback(self._stop)
            self._start()
            self._deadline = time.monotonic() + timeout
            self._open = stack.pop_all()

    def wait(self) -> int:
        """Wait until its first process ends, or its time is over and it is killed.

        Returns:
            What subprocess calls the return code: the exit code, or the negative number of the signal that killed it.

        Raises:
            OSError: if there is no such command, or it cannot be executed; FileNotFoundError and others of that kind.
            ContainerLost: if the supervisor was killed, and the container with it, or `end` was called.
        """
        if self._supervisor.stdin.closed:
            raise ContainerLost("a container is gone at the end of its body; wait for it inside")
        while self._status is None:
            try:
                event = self._next()
            except TimeoutError:
                self.timed_out = True
                self.kill()
                self._deadline = time.monotonic() + _PATIENCE
                continue
            if "no_command" in event:
                raise OSError(*event["no_command"])
            if "ended" in event:
                self._status = event["ended"]
        return self._status

    def kill(self) -> None:
        """Kill it. `wait` says when it is gone."""
        self._tell(KILL)

    def output(self) -> str:
        """What it has written to standard output and standard error, at most the first MiB of it."""
        return os.pread(self._output.fileno(), _MOST_OUTPUT, 0).decode(errors="replace")

    def value(self) -> Any:
        """What its function has returned; None if it has not, or is a command."""
        self._value.seek(0)
        pickled = self._value.read()
        return pickle.loads(pickled) if pickled else None

    def end(self) -> None:
        """Kill it if it still runs, and forget it."""
        self._open.close()

    def _start(self) -> None:
        """Listen until its work begins."""
        try:
            while "started" not in (event := self._next()):
                self.pid = event.get("pid", self.pid)
                if "failed" in event:
                    raise CannotContain(*event["failed"])
                if "ended" in event:
                    how = "was memory= less than it needs to start?" if event["ended"] == -9 else self.output()
                    raise NotStarted(f"the container ended with {event['ended']} before its work began: {how}")
        except TimeoutError as error:
            raise NotStarted(f"the container has not begun its work within {_PATIENCE:g} s") from error

    def _next(self) -> dict[str, Any]:
        """The supervisor's next event."""
        while b"\n" not in self._unread:
            left = self._deadline - time.monotonic()
            if not self._poll.poll(min(max(left, 0), _LONGEST) * 1000):
                if left > _LONGEST:
                    continue
                if self.timed_out:
                    raise ContainerLost(f"a container was killed, and is not gone after {_PATIENCE:g} s")
                raise TimeoutError
            data = os.read(self._events, 65536)
            if not data:
                raise ContainerLost(f"the supervisor of a container is gone. {self.output()}".strip())
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _tell(self, word: bytes) -> None:
        with suppress(OSError, ValueError):  # the supervisor is gone, or was ended
            self._supervisor.stdin.write(word)

    def _stop(self) -> None:
        self._tell(FORGET)
        try:
            self._supervisor.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self._supervisor.stdin.close()
