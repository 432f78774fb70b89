"""Messages between an engine's process and the one that started it: a length, then a tuple that begins with its kind.

    to the engine      factory(pickle)                          once
                       add(number, pickle)   drop(number)       the starting process numbers requests
                       check(number)
    from the engine    ready(pickle) or failed(pickle, text)    once
                       taken(number) or refused(number, pickle, text)
                       step(counts, when it began, numbers that ran first, [(number, ended, [fields of an output])])
                       checked(number) or refused(…)
                       died(text)                               the last one

Tuples of numbers and texts cross by `marshal`: a step's outputs are one message, and a token is a few bytes of it.
Everything else is pickled within them, so that what cannot be read is one request's fault.
"""

from __future__ import annotations

import marshal
import pickle
import struct
import traceback

_LENGTH = struct.Struct("<I")
_PLAIN = 2  # version of marshal's format that looks for no object that occurs twice, which takes longer than it saves


class RemoteTraceback(Exception):
    """The traceback of another process, as text: the cause of an error that comes from there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def framed(*message: object) -> bytes:
    """A message as it crosses."""
    body = marshal.dumps(message, _PLAIN)
    return _LENGTH.pack(len(body)) + body


class Messages:
    """Cuts what is received into messages."""

    def __init__(self) -> None:
        self._left = b""

    def feed(self, data: bytes) -> list[tuple]:
        """The messages that are whole now that these bytes have come."""
        data, place, found = self._left + data if self._left else data, 0, []
        while len(data) - place >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, place)
            end = place + _LENGTH.size + length
            if end > len(data):
                break
            found.append(marshal.loads(memoryview(data)[place + _LENGTH.size : end]))
            place = end
        self._left = data[place:]
        return found


def packed_error(error: BaseException) -> tuple[bytes, str]:
    """An error as it crosses: pickled, or nothing where it cannot be, and its traceback as text."""
    text = "".join(traceback.format_exception(error))
    try:
        return pickle.dumps(error), text
    except Exception:  # of whatever kind the object that does not pickle chooses
        return b"", text


def unpacked_error(packed: bytes, text: str) -> BaseException:
    """The error that was packed; a RuntimeError with its text if it cannot be read here."""
    try:
        error = pickle.loads(packed)
    except Exception:
        error = None
    if not isinstance(error, BaseException):
        error = RuntimeError(text.strip().rsplit("\n", 1)[-1])
    error.__cause__ = RemoteTraceback(text)
    return error
