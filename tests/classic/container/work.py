"""What runs inside of containers in these tests."""

import mmap
import os
import signal
import time
from pathlib import Path

MIB = 1 << 20


def touch(count):
    """Take so many bytes of memory in fact: write one byte in each page."""
    memory = mmap.mmap(-1, count)
    for position in range(0, count, mmap.PAGESIZE):
        memory[position] = 1
    return count


def fork_until_refused(most=64):
    """How many children there can be at a time, and the number of the error that ended it."""
    for count in range(most):
        try:
            if os.fork() == 0:
                signal.pause()
        except OSError as error:
            return count, error.errno
    return most, None


def spend(seconds):
    """Use so much processor time from now on."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return seconds


def status_of_child(work):
    """How a child ends that does the work: its exit code, or the negative number of a signal."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def hang_with_a_child():
    os.fork()
    hang()


def terminate_itself():
    """Send a signal that would kill any other process."""
    os.kill(os.getpid(), signal.SIGTERM)
    return "still here"


def names(folder):
    """What is in a folder."""
    return sorted(path.name for path in Path(folder).iterdir())
