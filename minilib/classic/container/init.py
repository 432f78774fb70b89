"""The process around a container: makes it, waits for it, and leaves nothing of it behind.

    Container ── spec ──► supervisor            in our namespaces, without limits
              ◄─ events ──   │  unshare, fork
                             └──► first process in its namespaces, its root, its cgroup; then it does the work

The supervisor's input ends when its parent does, whatever became of that; the container is killed then, and its cgroup
is removed. runc, which Docker and Kubernetes call, takes the same steps.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from minilib.classic.container.errors import CannotContain
from minilib.classic.container.limits import enter_group, remove_groups
from minilib.classic.container.namespaces import mount_proc, new_namespaces, own_mounts
from minilib.classic.container.root import OverlayRoot
from minilib.classic.container.syscalls import die_with_parent

KILL, FORGET = b"k", b"f"  # what a parent tells: end the container now; I take care of all that is left
_OPEN = b"o"


@dataclass(frozen=True)
class ContainerSpec:
    """All that the supervisor needs to know.

    Args:
        work: a pickled function without arguments, or a command's words.
        kinds: the namespaces that are new; none for a process that has resource limits only.
        hostname: the name that it takes its host for.
        root: what it takes for the disk, or None for the host's.
        groups: folder of its cgroup for each controller.
        doors: file by which it enters its cgroup, for one controller of each hierarchy.
        rlimits: the most that it may have of a resource, by the resource's number.
    """

    work: bytes | tuple[str, ...]
    kinds: tuple[str, ...] = ()
    hostname: str = ""
    root: OverlayRoot | None = None
    groups: dict[str, Path] = field(default_factory=dict)
    doors: dict[str, Path] = field(default_factory=dict)
    rlimits: dict[int, int] = field(default_factory=dict)


def supervise(spec: ContainerSpec, value: int, events: int) -> None:
    """Make a container, wait until it ends or shall end, and say so.

    Args:
        spec: the container.
        value: an open file for what the function returns.
        events: an open pipe for lines of JSON: pid; started; failed or no_command; ended.
    """
    try:
        if spec.kinds:
            new_namespaces(spec.kinds)
    except CannotContain as error:
        _say(events, failed=error.args)
        return
    door, key = os.pipe()  # the first process waits behind it until its number has been said
    pid = os.fork()
    if pid == 0:
        os.close(key)
        _first_process(spec, value, events, door)
    _say(events, pid=pid)
    os.write(key, _OPEN)
    ended, parent = os.pidfd_open(pid), sys.stdin.fileno()
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(parent, select.POLLIN)
    told = KILL if ended in dict(poll.poll()) else os.read(parent, 1)
    os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):  # it has not come to form a group of its own
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)  # of a PID namespace this is the last process to end
    _say(events, ended=os.waitstatus_to_exitcode(status))
    while told == KILL:
        told = os.read(parent, 1)
    if told != FORGET:  # the parent died before it could remove them
        remove_groups(spec.groups.values())


def _first_process(spec: ContainerSpec, value: int, events: int, door: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        die_with_parent()
        if os.read(door, 1) != _OPEN:
            sys.exit("the supervisor died before its container began")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        work = spec.work if isinstance(spec.work, tuple) else pickle.loads(spec.work)  # needs files of the old root
        entries = {controller: os.open(path, os.O_WRONLY | os.O_CLOEXEC) for controller, path in spec.doors.items()}
        if spec.kinds:
            own_mounts()
            socket.sethostname(spec.hostname)
            mount_proc() if spec.root is None else spec.root.enter()
        for number, most in spec.rlimits.items():
            resource.setrlimit(number, (most, most))
        for controller, entry in entries.items():
            enter_group(controller, entry)
        _say(events, started=True)
        if isinstance(work, tuple):
            _execute(work, events)
        os.close(events)
        result = work()
        with open(value, "wb") as file:  # noqa: PTH123
            pickle.dump(result, file)
        status = 0
    except CannotContain as error:
        _say(events, failed=error.args)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        sys.stderr.write(f"{error.code}\n" * isinstance(error.code, str))
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)


def _execute(words: tuple[str, ...], events: int) -> None:
    """Become a command; only if there is no such command, come back."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and a command would inherit that
    try:
        os.execvp(words[0], words)
    except OSError as error:
        _say(events, no_command=[error.errno, error.strerror, words[0]])
        os._exit(127)


def _say(events: int, **event: object) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more
        os.write(events, json.dumps(event).encode() + b"\n")


def supervise_as_told() -> None:
    """Read the specification from the open file that the first argument names, and supervise."""
    given, value, events = map(int, sys.argv[1:])
    for number in (value, events):
        os.set_inheritable(number, False)  # a command shall not have them
    with open(given, "rb") as file:  # noqa: PTH123
        spec = pickle.load(file)
    supervise(spec, value, events)
