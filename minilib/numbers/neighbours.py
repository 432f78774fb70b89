"""Who else is at work: a clock tells of this process only while others leave the cores alone."""

from __future__ import annotations

import contextlib
import os
import time

import psutil

BUSY = 0.1  # share of the cores; where others take more, a clock tells of them as well
TICK = 0.01  # seconds; in such steps the operating system counts each core's work, and so far it may be off
_AT_WORK = ("user", "nice", "system", "irq", "softirq", "interrupt", "dpc", "steal")  # not all systems have all of them


class Watch:
    """Counts the processor time that others take from the moment it is made.

    Others are all processes but this one and its descendants, and other machines on the same hardware where the
    hypervisor tells (steal).
    """

    def __init__(self) -> None:
        self._before = _clocks()

    @property
    def busy(self) -> float:
        """Share of the cores that others have certainly taken since, from 0 to 1: of each core a tick is in doubt."""
        elapsed, at_work, own = (now - then for now, then in zip(_clocks(), self._before, strict=True))
        if elapsed <= 0:
            return 0.0
        return min(1.0, max(0.0, ((at_work - own) / len(_cores()) - TICK) / elapsed))


def _clocks() -> tuple[float, float, float]:
    """Seconds now, processor seconds of everybody, and processor seconds of this process and its descendants."""
    cores, counted = _cores(), psutil.cpu_times(percpu=True)
    everybody = sum(getattr(counted[core], kind, 0.0) for core in cores for kind in _AT_WORK)
    return time.perf_counter(), everybody, time.process_time() + _descendants()


def _cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count()))


def _descendants() -> float:
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended, and is in its parent's account
            seconds += sum(child.cpu_times()[:4])  # its own and its ended children's, user and system
    return seconds
