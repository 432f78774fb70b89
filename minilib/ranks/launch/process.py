"""The process of a rank, seen from the process that called `run`."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import signal
from dataclasses import dataclass

from minilib.ranks.launch.fork_server import read_number
from minilib.ranks.launch.group import is_ours
from minilib.ranks.launch.rank import Rank


@dataclass
class RankProcess:
    """The process of a rank: what has been heard of it, and how to end it.

    Args:
        rank: what was sent to the fork server.
        status: file descriptor from which `read_number` reads the process's pid, then its exit code.
        pipe: file descriptor, the write end of the pipe that the process reads.
        pid: number of the process, and of the process group of its children; None until the fork server has sent it.
        ended: whether the process has ended.
        code: exit code, negative for a signal; None while the process runs, or if the fork server died first.
        report: "value" or "failure" once the rank has written that file, else empty.
    """

    rank: Rank
    status: int
    pipe: int
    pid: int | None = None
    ended: bool = False
    code: int | None = None
    report: str = ""

    @property
    def vanished(self) -> bool:
        """Whether the fork server died before the process, or with it."""
        return self.ended and self.code is None

    def read_status(self) -> None:
        """Read the pid or the exit code that the fork server has sent."""
        try:
            number = read_number(self.status)
        except EOFError:
            self.ended = True
            return
        if self.pid is None:
            self.pid = number
        else:
            self.ended, self.code = True, number

    def kill(self) -> None:
        """End the process, if it runs, and its children, in any case."""
        if self.pid is not None:
            for kill in (os.kill, os.killpg) if self.code is None else (os.killpg,):
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS denies what does not exist
                    kill(self.pid, signal.SIGKILL)

    def epitaph(self) -> str:
        """How the process ended, in words."""
        if self.code is None:
            return "vanished: the fork server that started it is gone"
        if self.code >= 0:
            return f"exited with code {self.code} before its function returned"
        names = {number.value: number.name for number in signal.Signals}
        hint = ", as the system does when memory runs out" if self.code == -signal.SIGKILL else ""
        return f"was killed by {names.get(-self.code, f'signal {-self.code}')}{hint}"

    def stack(self) -> str:
        """The stack that the process has written, if it has: innermost call first, with source lines where known."""
        path = self.rank.file("stack")
        shown: list[str] = []
        outer = False  # whether the frames are launch's own and their callers
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            frame = re.match(r'\s*File "(.*)", line (\d+) in ', line)
            outer = frame is not None and (outer or is_ours(frame[1]))  # each thread's stack begins with another line
            if not outer:
                shown.append(line)
                if frame:
                    shown.append("    " + linecache.getline(frame[1], int(frame[2])).strip())
        return "".join("\n" + line for line in shown if line.strip())
