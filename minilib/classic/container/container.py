"""A container by hand: a process in namespaces of its own, in a cgroup, on a copy-on-write root, and no more than that.

    Container          start, wait, kill     one container, with everything it has at its end taken away
    run_in_container   the same at one go
    run_with_rlimits   the limits that every process may give itself, where a kernel does not let us have a container

Work is a command, or a function, which is a fork of this interpreter's copy: it has what it has imported, also on a
root that holds no Python.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import cloudpickle

from minilib.classic.container.errors import InvalidLimit, NotStarted
from minilib.classic.container.init import ContainerSpec
from minilib.classic.container.limits import MOST, Cgroup, ContainerLimits, Counted
from minilib.classic.container.namespaces import kinds_for_us
from minilib.classic.container.root import OverlayRoot
from minilib.classic.container.supervised import SupervisedProcess
from minilib.mechanisms.basics import interrupts
from minilib.mechanisms.basics.checks import check_quantity, whole

Work = Callable[[], Any] | Sequence[str]


@dataclass(frozen=True)
class ContainerResult:
    """How a container ended.

    Attributes:
        status: exit code of its first process, or the negative number of the signal that killed it; 1 for a function
            that raised.
        value: what its function returned.
        output: what it wrote to standard output and standard error; of a function that raised, the traceback as well.
        counted: what the kernel counted in its cgroup.
        timed_out: whether it was killed because its time was over.
    """

    status: int
    value: Any
    output: str
    counted: Counted
    timed_out: bool


class Container:
    """One container, as a context manager: it runs from the beginning of the body, and is gone at its end.

    Args:
        work: a function without arguments, or the words of a command. A function's result must be picklable; what it
            imports must be there on its root, or have been imported by its module before.
        memory: most bytes; who asks for more is killed.
        pids: most processes and threads, its first among them.
        cpus: most processors' worth of time.
        root: what it takes for the disk; the host's disk if left out, and then it may write there what we may.
        hostname: the name that it takes its host for, 1 to 64 bytes.
        timeout: seconds from the beginning of its work until it is killed.

    Raises:
        InvalidLimit: if a limit is one that no process can be held to.
        ValueError: if the hostname, the timeout or the command is wrong, another container uses this root, or it runs.
        TypeError: if the root is something else.
        CannotContain: when it is entered, if the kernel does not let us have a part of it.
        NotStarted: when it is entered, if it dies before its work begins.
    """

    def __init__(
        self,
        work: Work,
        *,
        memory: int | None = None,
        pids: int | None = None,
        cpus: float | None = None,
        root: OverlayRoot | None = None,
        hostname: str = "container",
        timeout: float = 60.0,
    ) -> None:
        if not isinstance(hostname, str) or not 1 <= len(hostname.encode()) <= 64 or "\0" in hostname:
            raise ValueError(f"a hostname has 1 to 64 bytes, none of them 0, got {hostname!r}")
        if not isinstance(root, OverlayRoot | None):
            raise TypeError(f"a root is an OverlayRoot over layers, got {root!r}")
        self._limits = ContainerLimits(memory, pids, cpus)
        self._work, self._root, self._hostname, self._timeout = _packed(work), root, hostname, _checked(timeout)
        self._process: SupervisedProcess | None = None
        self._stack: ExitStack | None = None

    def __enter__(self) -> Container:
        if self._stack is not None:
            raise ValueError("this container runs already; make another one for another run at the same time")
        with ExitStack() as stack:
            if self._root is not None:
                stack.enter_context(self._root.used())
            self._cgroup = stack.enter_context(Cgroup(self._limits))
            groups, doors = self._cgroup.folders, self._cgroup.doors
            spec = ContainerSpec(self._work, kinds_for_us(), self._hostname, self._root, groups, doors)
            self._process = SupervisedProcess(spec, self._timeout)
            stack.callback(self._process.end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with interrupts.held():
            self._stack.close()
            self._stack = None

    @property
    def pid(self) -> int:
        """Number of its first process, as the host sees it.

        Raises:
            NotStarted: if it was never entered; so do all that follow.
        """
        return self._entered().pid

    @property
    def cgroup(self) -> Cgroup:
        """The cgroup that it is in."""
        self._entered()
        return self._cgroup

    def kill(self) -> None:
        """Kill all its processes, if any are left."""
        self._entered().kill()

    def wait(self) -> ContainerResult:
        """Wait until its first process has ended, and with it all others, or its time is over.

        Raises:
            OSError: if there is no such command; FileNotFoundError and others of that kind.
            ContainerLost: if someone killed its supervisor, and so the container; or the body is over.
        """
        return _result(self._entered(), self._cgroup.counted)

    def _entered(self) -> SupervisedProcess:
        if self._process is None:
            raise NotStarted("the container has not been started: use it in the body of `with Container(…) as …`")
        return self._process


def run_in_container(work: Work, **how: Any) -> ContainerResult:
    """Run a function or a command in a container, and take the container away.

    Args:
        work: the function or the command.
        **how: as for `Container`.

    Raises:
        Exception: as for `Container` and `Container.wait`.
    """
    with Container(work, **how) as container:
        return container.wait()


def run_with_rlimits(
    work: Work, *, address_space: int | None = None, processes: int | None = None, timeout: float = 60.0
) -> ContainerResult:
    """Run a function or a command in a process that has resource limits: no namespaces, no cgroup, no root needed.

    Here a limit is a promise refused, not a process killed: malloc fails, in Python with MemoryError.

    Args:
        work: as for `Container`.
        address_space: most bytes of addresses that the process may reserve, whether it touches them or not
            (RLIMIT_AS). The interpreter takes part of it.
        processes: most processes and threads of this process's user on the whole machine (RLIMIT_NPROC); root has
            as many as it likes.
        timeout: seconds from the beginning of its work until it is killed.

    Raises:
        InvalidLimit: if a limit is below 0, more than the kernel counts to, or not a whole number.
        NotStarted: if it dies before its work begins.
        OSError: if there is no such command.
    """
    asked = {resource.RLIMIT_AS: address_space, resource.RLIMIT_NPROC: processes}
    rlimits = {number: whole(most) for number, most in asked.items() if most is not None}
    for number, most in rlimits.items():
        if most is None or not 0 <= most <= MOST:
            raise InvalidLimit(f"a resource limit must be a whole number, 0 to 2**63 - 1, got {asked[number]!r}")
    process = SupervisedProcess(ContainerSpec(_packed(work), rlimits=rlimits), _checked(timeout))
    try:
        return _result(process, Counted)
    finally:
        process.end()


def _result(process: SupervisedProcess, counted: Callable[[], Counted]) -> ContainerResult:
    status = process.wait()
    value = process.value() if status == 0 else None
    return ContainerResult(status, value, process.output(), counted(), process.timed_out)


def _packed(work: Work) -> bytes | tuple[str, ...]:
    if callable(work):
        return cloudpickle.dumps(work)
    words = tuple(work) if isinstance(work, Sequence) and not isinstance(work, str) else ()
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words) or not words[0]:
        raise ValueError(f"a command is a list of words, as ['ls', '-l'], got {work!r}")
    return words


def _checked(timeout: float) -> float:
    check_quantity("a timeout", timeout, above_zero=True)
    return float(timeout)
