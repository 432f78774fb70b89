"""A process between two pipes: it reads an item from standard input, works on it in units, and writes it to standard
output. The first stage makes the items, the last one keeps them.

An item is a page of bytes, so that a pipe of k pages holds k items. It begins with its number and the result of the
work so far, which shows in the end whether every stage did all its units, once and in order.

Its work comes over a socket first (`packed_units`), then commands, a byte each; every answer is a `REPORT`:

    READY   nothing; the answer says that the process has started
    MOVE    hand the finished item on, or else take the next one, whatever can be done without waiting
    UNIT    do a unit of work, if there is an item that needs one
    RUN     work on all items without further commands, waiting in read and write; an answer for each item with the
            times of its begin and end, and one more with the seconds in read and in write
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence

from minilib.classic.counted_work import next_result

PAGE = os.sysconf("SC_PAGE_SIZE")
READY, MOVE, UNIT, RUN = b"?", b"m", b"u", b"r"
STARVED, WORKING, BLOCKED, FINISHED = b"s", b"w", b"b", b"f"
REPORT = struct.Struct("!c?idd32s")  # state, whether something moved, item, two times, result of the item
_LENGTH = struct.Struct("!Q")
_ITEM = struct.Struct("!i32s")


class Stage:
    """What the process does.

    Args:
        units: of work, for each item.
        first, last: whether it is the first stage, and the last.
        unit_seconds: least time of a unit when it runs by itself.
    """

    def __init__(self, units: Sequence[int], first: bool, last: bool, unit_seconds: float) -> None:
        self._units, self._first, self._last, self._unit_seconds = units, first, last, unit_seconds
        self._item, self._left, self._result = -1, 0, bytes(32)
        self._holds = False

    def state(self) -> bytes:
        """What the stage waits for, or that it does not."""
        if self._holds:
            return WORKING if self._left else BLOCKED
        return FINISHED if self._item + 1 == len(self._units) else STARVED

    def report(self, moved: bool = False, one: float = 0.0, other: float = 0.0) -> bytes:
        """The answer to a command."""
        return REPORT.pack(self.state(), moved, self._item, one, other, self._result)

    def move(self) -> bool:
        """Give the finished item, or take one; False if neither can be done now."""
        for end in (0, 1):
            os.set_blocking(end, False)
        try:
            if self.state() == BLOCKED:
                self._give()
                return True
            if self.state() == STARVED:
                self._take()
                return True
        except BlockingIOError:
            pass
        return False

    def unit(self) -> bool:
        """Work on the item, if it needs work."""
        if self.state() != WORKING:
            return False
        self._result, self._left = next_result(self._result), self._left - 1
        return True

    def run(self, answers: socket.socket) -> None:
        """All items, waiting where that is needed."""
        reading = writing = 0.0
        for _ in self._units:
            asked = time.monotonic()
            self._take()
            begun = time.monotonic()
            for done in range(self._left):
                self.unit()
                time.sleep(max(0.0, begun + (done + 1) * self._unit_seconds - time.monotonic()))
            ended = time.monotonic()
            answers.sendall(self.report(True, begun, ended))
            reading += begun - asked
            self._give()
            writing += time.monotonic() - ended
        answers.sendall(self.report(True, reading, writing))

    def _take(self) -> None:
        number, result = self._item + 1, hashlib.sha256(str(self._item + 1).encode()).digest()
        if not self._first:
            page = os.read(0, PAGE)
            while page and len(page) < PAGE:
                page += os.read(0, PAGE - len(page))
            if not page:
                sys.exit("the stage before has ended")
            number, result = _ITEM.unpack_from(page)
        self._item, self._result, self._left, self._holds = number, result, self._units[number], True

    def _give(self) -> None:
        if not self._last:
            page = _ITEM.pack(self._item, self._result).ljust(PAGE, b"\0")
            while page:
                page = page[os.write(1, page) :]
        self._holds = False


def packed_units(units: Sequence[int]) -> bytes:
    """Units of work for each item, as a stage reads them before its first command."""
    text = ",".join(map(str, units)).encode()
    return _LENGTH.pack(len(text)) + text


def answer_commands() -> None:
    """The process: `python -m minilib.classic.pipe_stage <socket> <first> <last> <seconds of a unit>`."""
    number, first, last, unit_seconds = sys.argv[1:]
    commands = socket.socket(fileno=int(number))
    (length,) = _LENGTH.unpack(_exactly(_LENGTH.size, commands))
    units = [int(count) for count in _exactly(length, commands).split(b",")]
    stage = Stage(units, first == "1", last == "1", float(unit_seconds))
    while command := commands.recv(1):  # nothing once nobody is there any more
        if command == RUN:
            stage.run(commands)
            continue
        moved = {READY: lambda: False, MOVE: stage.move, UNIT: stage.unit}[command]()
        commands.sendall(stage.report(moved))


def _exactly(length: int, commands: socket.socket) -> bytes:
    data = commands.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        sys.exit("nobody is there any more")
    return data


if __name__ == "__main__":
    answer_commands()
