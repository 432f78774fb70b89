"""Ctrl-C at a time that suits: not between two steps that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[list[int]]:
    """Note interrupts instead of raising them, until the body ends.

    Within another one it notes for itself: what it raises at its end comes out within the body of the outer one.

    Only the main thread is ever interrupted; in others this does nothing.

    Yields:
        A list that an interrupt adds to: where it would do no harm, the body may look and raise KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: at the end, if there was one.
    """
    noted: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield noted
        return
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            raise KeyboardInterrupt from None
