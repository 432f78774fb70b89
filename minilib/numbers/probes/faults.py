"""Page faults as the operating system counts them: demand paging and copy-on-write, watched from outside.

Each question runs in a process of its own, because a fault count belongs to a whole process and a notebook's kernel
has many threads that fault as they like.
"""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys


class NoForkHere(RuntimeError):
    """This platform has no fork or no fault counts; the message says which."""


def demand_paging(pages: int, touched: int) -> int:
    """Page faults of a process that reserves `pages` of memory and writes to `touched` of them, evenly spread."""
    return _ask("touch", pages, touched)


def copy_on_write(pages: int, written: int) -> int:
    """Page faults of a child that is forked from a process with `pages` of memory and writes to `written` of them."""
    return _ask("fork", pages, written)


def _ask(question: str, pages: int, count: int) -> int:
    if not 0 <= count <= pages:
        raise ValueError(f"between 0 and {pages} of {pages} pages can be written, got {count}")
    if not hasattr(os, "fork"):
        raise NoForkHere(f"{sys.platform} has no fork")
    command = [sys.executable, "-m", "minilib.numbers.probes.faults", question, str(pages), str(count)]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def _touch(pages: int, touched: int) -> int:
    memory, scratch = _reserve(pages), _reserve(pages)
    for _ in range(3):  # the loop's own objects may need a page the first time
        _write(scratch, pages, touched)
        before = _faults()
    _write(memory, pages, touched)
    return _faults() - before


def _fork(pages: int, written: int) -> int:
    memory, scratch = _reserve(pages), _reserve(8)
    _write(memory, pages, pages)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for _ in range(3):  # the first faults after a fork are the interpreter's own
            _write(scratch, 8, 8)
            before = _faults()
        _write(memory, pages, written)
        os.write(writer, str(_faults() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 64))


def _reserve(pages: int) -> mmap.mmap:
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or one fault would bring 2 MiB
    return memory


def _write(memory: mmap.mmap, pages: int, count: int) -> None:
    for k in range(count):
        memory[(k * pages // count) * mmap.PAGESIZE] = 1


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    answer = {"touch": _touch, "fork": _fork}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(str(answer))
