"""A process of counted_work.py that is stopped (SIGSTOP) and continued (SIGCONT), and does a unit when it is told.

The kernel holds it stopped; a token that it waits for before each unit keeps it from a unit that it was not given.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil

from minilib.classic.counted_work import REPORT, TOKEN
from minilib.mechanisms.basics.child import child_environment

TIMEOUT = 30.0  # seconds


class WorkerFailed(RuntimeError):
    """A worker died, or did not answer in time; the message says how."""


class WorkerProcess:
    """A worker's process. It starts stopped, and does a unit only while it is continued.

    Args:
        name: what its result depends on.
        units: units of work that it takes, at least 1.
        timeout: seconds for each answer of it.

    Raises:
        WorkerFailed: if it cannot be started, or dies at once.
    """

    def __init__(self, name: str, units: int, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(timeout)
        command = [sys.executable, "-P", "-S", "-m", "minilib.classic.counted_work", name, str(units)]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    env=child_environment(),
                    # Not a session of its own: if this process dies, the kernel continues stopped groups and hangs up.
                    process_group=0,
                )
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError | ValueError):  # too many processes, a name too long or with a NUL
                raise WorkerFailed(f"a process for {name[:40]!r} cannot be started: {error}") from error
            raise
        try:
            self._report()
            self.stop()
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._process.pid

    @property
    def status(self) -> str:
        """What the kernel says of it: psutil.STATUS_STOPPED, or running, sleeping …"""
        return psutil.Process(self.pid).status()

    def stop(self) -> None:
        """Have the kernel stop it, and wait until it is stopped.

        Raises:
            WorkerFailed: if it is not.
        """
        self._signal(signal.SIGSTOP)
        end = time.monotonic() + self._timeout
        while (status := self.status) != psutil.STATUS_STOPPED:
            if status == psutil.STATUS_ZOMBIE or time.monotonic() > end:
                raise WorkerFailed(f"process {self.pid} was told to stop, and is {status}")
            time.sleep(0.0005)

    def resume(self) -> None:
        """Let it go on.

        Raises:
            WorkerFailed: if it is dead.
        """
        self._signal(signal.SIGCONT)

    def do_unit(self) -> tuple[bool, bytes]:
        """Have it do one unit.

        Returns:
            Whether that was the last one, and its result so far.

        Raises:
            WorkerFailed: if it dies, or does not answer in time.
        """
        try:
            self._socket.sendall(TOKEN)
        except OSError as error:
            raise WorkerFailed(self._how()) from error
        return self._report()

    def end(self) -> None:
        """Kill it if it still lives, stopped or not, and forget it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            if self._process.poll() is None:
                os.killpg(self.pid, number)
                return
        except PermissionError:  # what macOS says of a group that has just died
            pass
        raise WorkerFailed(self._how())

    def _report(self) -> tuple[bool, bytes]:
        data = b""
        while len(data) < REPORT.size:
            try:
                part = self._socket.recv(REPORT.size - len(data))
            except TimeoutError as error:
                raise WorkerFailed(f"process {self.pid} did not answer within {self._timeout:g} s") from error
            except OSError as error:
                raise WorkerFailed(self._how()) from error
            if not part:
                raise WorkerFailed(self._how())
            data += part
        return REPORT.unpack(data)

    def _how(self) -> str:
        try:
            code = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            return f"process {self.pid} has closed its connection"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"process {self.pid} {how}"
