"""Processes forked from one that has torch loaded: all that launch takes from CPython's private interfaces.

`multiprocessing.Process` would run the main script again in every rank, so launch speaks to the fork server of
`multiprocessing` directly. The names below are not documented; tests/ranks/launch/test_interfaces.py runs them on every
Python at hand.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from minilib.ranks.launch.errors import UnsupportedPython, WorkingFolderGone

_INTERFACES = {  # name in multiprocessing.forkserver: its parameters
    "ForkServer.set_forkserver_preload": ("self", "modules_names"),
    "ForkServer.ensure_running": ("self",),
    "ForkServer.connect_to_new_process": ("self", "fds"),
    "ForkServer._stop_unlocked": ("self",),
    "get_inherited_fds": (),
    "read_signed": ("fd",),
}


def check_interfaces(module: object = forkserver, process: type = BaseProcess) -> None:
    """Check that this Python has the private interfaces that launch needs.

    Raises:
        UnsupportedPython: if a function is missing or requires other arguments; the message names it.
    """
    needed = [(f"multiprocessing.forkserver.{name}", _find(module, name), names) for name, names in _INTERFACES.items()]
    bootstrap = ("self", "parent_sentinel")
    needed.append(("multiprocessing.process.BaseProcess._bootstrap", _find(process, "_bootstrap"), bootstrap))
    for name, function, parameters in needed:
        try:
            inspect.signature(function).bind(*parameters)
        except TypeError as error:
            found = f"takes other arguments ({error})" if callable(function) else "is missing"
            raise UnsupportedPython(
                f"launch.run needs {name}({', '.join(parameters)}), which {found} in Python {sys.version.split()[0]}: "
                "use a Python on which tests/ranks/launch/test_interfaces.py passes, such as 3.11 to 3.13"
            ) from None


def _find(owner: object, path: str) -> object:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


check_interfaces()


class Bootstrapped(Protocol):
    """What the fork server runs: an object that pickles and whose `_bootstrap` is called in the new process."""

    def _bootstrap(self, parent_sentinel: int) -> int | None:
        """Run the process.

        Args:
            parent_sentinel: file descriptor, the read end of the pipe whose write end `ForkServer.start` returned.

        Returns:
            The exit code.
        """


class ForkServer(forkserver.ForkServer):
    """The fork server of this process: starts with the first process it is asked for, ends with this process.

    Args:
        preload: names of the modules that the fork server imports before it forks.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        super().__init__()
        self._owner = os.getpid()
        self.preload(preload)

    def preload(self, names: Sequence[str]) -> None:
        """Have the fork server import these modules when it starts, instead of those named before."""
        self._names = list(names)
        self.set_forkserver_preload(self._names)

    def ensure_running(self) -> None:
        """Start the fork server unless it runs; a forked copy of its owner starts one of its own."""
        if self._owner != os.getpid():
            self.__init__(self._names)
        super().ensure_running()

    def forget(self, pid: int | None) -> None:
        """Wait for the end of a fork server that has died, so that the next process gets another one.

        Its connections break a moment before the operating system counts it among the dead.

        Args:
            pid: of the dead one; nothing is done if another one runs already.
        """
        with self._lock:
            if pid is not None and self._forkserver_pid == pid:
                self._stop_unlocked()

    @property
    def pid(self) -> int | None:
        """Of the fork server; None before the first process."""
        return self._forkserver_pid

    def start(self, process: Bootstrapped, fds: Sequence[int]) -> tuple[int, int]:
        """Start a process in the working folder, with the sys.path and sys.argv, of this one.

        Args:
            process: what the new process runs.
            fds: file descriptors that the new process inherits, `inherited_fds` there.

        Returns:
            File descriptors: one from which `read_number` reads the pid, then the exit code, and the write end of
            the pipe that the process reads.

        Raises:
            WorkingFolderGone: if the working folder was deleted.
        """
        prepare = {"sys_path": sys.path, "sys_argv": sys.argv, "dir": working_folder()}
        status, pipe = self.connect_to_new_process(list(fds))
        with open(pipe, "wb", closefd=False) as file, suppress(BrokenPipeError):
            file.write(pickle.dumps(prepare) + pickle.dumps(process))
        return status, pipe


def working_folder() -> str:
    """The working folder of this process.

    Raises:
        WorkingFolderGone: if it was deleted.
    """
    try:
        return str(Path.cwd())
    except FileNotFoundError as error:
        raise WorkingFolderGone(
            "the working folder of this process was deleted, so ranks cannot start in it: os.chdir() to one that exists"
        ) from error


def inherited_fds() -> list[int]:
    """In a process that the fork server started: the file descriptors it was given."""
    return forkserver.get_inherited_fds()


def read_number(fd: int) -> int:
    """The next number from the fork server: a pid or an exit code, negative for a signal.

    Raises:
        EOFError: if the fork server is gone.
    """
    return forkserver.read_signed(fd)
