"""A process that does work in units and says after each how far it is. It starts a unit only when it is given a token.

A unit is a number of rounds of SHA-256, each over the result of the one before, so that the result shows whether every
unit was done once and in order, however often the process was stopped between or within them.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import sys

ROUNDS = 200  # of one unit
TOKEN = b"t"
REPORT = struct.Struct("!?32s")  # whether that was the last unit, and the result so far


def next_result(result: bytes) -> bytes:
    """Do one unit."""
    for _ in range(ROUNDS):
        result = hashlib.sha256(result).digest()
    return result


def work_in_units() -> None:
    """The process: `python -m minilib.classic.counted_work <name> <units>`, with a socket as standard input."""
    name, units = sys.argv[1], int(sys.argv[2])
    queue = socket.socket(fileno=0)
    queue.sendall(REPORT.pack(False, bytes(32)))  # it has started
    result = name.encode()
    for left in reversed(range(units)):
        if queue.recv(1) != TOKEN:
            return  # nobody is there any more who wants the result
        result = next_result(result)
        queue.sendall(REPORT.pack(not left, result))


if __name__ == "__main__":
    work_in_units()
