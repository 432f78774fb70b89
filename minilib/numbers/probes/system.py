"""The operating system's prices: starting a process, a message to a neighbour, bytes that must survive a crash."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from minilib.numbers.measure import measure

TIMEOUT = 20.0  # seconds; no probe waits longer for its peer

_ECHO = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=20) as peer:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(1 << 20)
    while (count := peer.recv_into(buffer)):
        if sys.argv[2] == "echo":
            peer.sendall(memoryview(buffer)[:count])
"""


def process_start(budget: float = 0.4) -> float:
    """Seconds from asking for a Python interpreter that does nothing to its having exited."""
    command = [sys.executable, "-I", "-S", "-c", "pass"]
    return measure(lambda: subprocess.run(command, check=True, timeout=TIMEOUT), budget=budget).seconds


def thread_lock(budget: float = 0.1) -> float:
    """Seconds to take and give back an uncontended lock, from Python."""
    lock = threading.Lock()

    def lock_unlock() -> None:
        lock.acquire()
        lock.release()

    return measure(lock_unlock, budget=budget).seconds


def loopback_round_trip(budget: float = 0.3) -> float:
    """Seconds for one byte over TCP to another process on this machine and back."""
    with _peer("echo") as connection:

        def ping() -> None:
            connection.sendall(b"x")
            connection.recv(1)

        return measure(ping, budget=budget).seconds


def loopback_bandwidth(nbytes: int = 256 * 2**20) -> float:
    """Bytes per second over TCP to another process on this machine, in one direction."""
    block = memoryview(bytearray(1 << 20))
    with _peer("sink") as connection:
        connection.sendall(block)
        started = time.perf_counter()
        for _ in range(nbytes // len(block)):
            connection.sendall(block)
        return nbytes / (time.perf_counter() - started)


def loopback_duplex_bandwidth(nbytes: int = 256 * 2**20) -> float:
    """Bytes per second in each direction when both are busy, as in a collective: the peer returns all it is sent."""
    block = memoryview(bytearray(1 << 20))
    count = nbytes // len(block)
    with _peer("echo") as connection, ThreadPoolExecutor(1) as pool:
        started = time.perf_counter()
        sender = pool.submit(lambda: [connection.sendall(block) for _ in range(count)])
        _receive(connection, count * len(block))
        sender.result(TIMEOUT)
        return count * len(block) / (time.perf_counter() - started)


def _receive(connection: socket.socket, nbytes: int) -> None:
    received, buffer = 0, bytearray(1 << 20)
    while received < nbytes:
        arrived = connection.recv_into(buffer)
        if not arrived:
            raise ConnectionError(f"the peer hung up after {received} of {nbytes} bytes")
        received += arrived


def fsync_latency(directory: Path, budget: float = 0.5) -> float:
    """Seconds to append 4 KiB to a file and have the operating system swear that it is on the disk."""
    block = os.urandom(4096)
    with _scratch_file(directory) as file:

        def append() -> None:
            os.write(file, block)
            os.fsync(file)

        return measure(append, budget=budget).seconds


def disk_bandwidths(directory: Path, nbytes: int = 256 * 2**20) -> dict[str, float]:
    """Bytes per second of writing a file and syncing it, of reading it back, and seconds per random 4 KiB read.

    The page cache is asked to forget the file before each read; where that cannot be asked, reads are left out. A
    hypervisor or a disk controller may still hold the file in memory of its own.
    """
    block = os.urandom(1 << 20)
    with _scratch_file(directory) as file:
        started = time.perf_counter()
        for _ in range(nbytes // len(block)):
            os.write(file, block)
        os.fsync(file)
        result = {"disk_write": nbytes / (time.perf_counter() - started)}
        if hasattr(os, "posix_fadvise"):
            result["disk_random_4k"] = _random_reads(file, nbytes)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            for offset in range(0, nbytes, len(block)):
                os.pread(file, len(block), offset)
            result["disk_read"] = nbytes / (time.perf_counter() - started)
    return result


def _random_reads(file: int, nbytes: int, count: int = 200) -> float:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: it would fetch the neighbours as well
    pages = nbytes // 4096
    offsets = [(7919 * i % pages) * 4096 for i in range(count)]
    started = time.perf_counter()
    for offset in offsets:
        os.pread(file, 4096, offset)
    seconds = (time.perf_counter() - started) / count
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_NORMAL)
    return seconds


@contextmanager
def _scratch_file(directory: Path) -> Iterator[int]:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="probe-") as file:
        yield file.fileno()


@contextmanager
def _peer(role: str) -> Iterator[socket.socket]:
    """A connection to a fresh process that echoes or swallows what it is sent; gone when the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT)
        port = str(server.getsockname()[1])
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _ECHO, port, role])
        try:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(TIMEOUT)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield connection
            process.wait(TIMEOUT)
        finally:
            process.kill()
            process.wait()
