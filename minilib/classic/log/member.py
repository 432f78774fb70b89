"""A follower as its leader sees it: a process to start and to end, a channel for messages, and its last answer."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from minilib.classic.log.channel import Channel
from minilib.mechanisms.basics.child import child_environment


class LogMember:
    """A follower's process, which starts now and ends when `end` is called or this process is gone.

    Not a multiprocessing.Process: that would run the main script of its parent again.

    Args:
        rank: its number.
        path: its log.
        fsync: as of LogFile.

    Attributes:
        control: the channel to it.
        first: what it answered first; empty until it has started.
        answer: what it answered last.
    """

    def __init__(self, rank: int, path: Path, fsync: bool) -> None:
        self.rank = rank
        self.first: dict = {}
        self.answer: dict = {}
        ours, theirs = socket.socketpair()
        self.control = Channel(ours)
        module = "minilib.classic.log.follower"  # the standard library does for it: -S starts it in half the time
        command = [sys.executable, "-P", "-S", "-m", module, str(rank), str(path), f"{fsync:d}"]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=child_environment(),
                start_new_session=True,  # an interrupt is for the leader alone
            )

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._process.pid

    def hear(self) -> None:
        """Take in what it has answered."""
        for _, body in self.control.messages():
            self.answer = json.loads(body)
            self.first = self.first or self.answer

    def kill(self) -> None:
        """Send SIGKILL and wait until it is dead."""
        self._process.kill()
        self._process.wait()

    def end(self, deadline: float) -> str:
        """Let it end by itself until the deadline, a time of `time.monotonic`, then kill it.

        Returns:
            How it ended, for people.
        """
        self.control.close()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
        with self._process.stderr as stream:
            complaint = stream.read().decode(errors="replace").strip()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{how}: {complaint.splitlines()[-1]}" if complaint else how
