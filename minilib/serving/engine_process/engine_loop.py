"""The process of an engine, from within: one thread reads what is asked, steps, and sends what the step made.

Nothing else runs here while the engine computes: what is asked lies in the socket until the step is done, so no
receiving thread takes the interpreter from the stepping one. The process ends when the one that started it closes the
socket, or is gone.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import socket
import threading

from minilib.serving.asynchronous.counted_steps import CountedSteps
from minilib.serving.engine import Engine
from minilib.serving.engine_process.messages import Messages, framed, packed_error
from minilib.serving.request import TokenOutput

_AT_ONCE = 1 << 16  # bytes


class EngineLoop:
    """Serves an engine over a socket until the other end is closed.

    Args:
        connection: to the process that asks; blocking.
        messages: what has been received of it.
        engine: the engine, which nobody else calls.
    """

    def __init__(self, connection: socket.socket, messages: Messages, engine: Engine) -> None:
        self.connection, self.messages, self.steps = connection, messages, CountedSteps(engine)
        self._names: dict[int, str] = {}  # number of a request → the client's name for it
        self._numbers: dict[str, int] = {}

    def run(self) -> None:
        """Read and step until the other end is closed."""
        while self._attend():
            self._hand_out(self.steps.step())

    def _attend(self) -> bool:
        """Do what was asked since the last step, and wait where there is nothing to compute; False at the end."""
        while True:
            idle = not self.steps.engine.has_unfinished
            try:
                data = self.connection.recv(_AT_ONCE, 0 if idle else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if not data:
                return False
            for message in self.messages.feed(data):
                self._do(*message)

    def _do(self, kind: str, number: int, *payload: bytes) -> None:
        if kind == "drop":
            self._drop(number)
            return
        try:
            if kind == "add":
                self._add(number, *payload)
            else:
                self._check()
        except Exception as error:  # InvalidRequest, or whatever a wrong argument raises: the others go on
            self._send("refused", number, *packed_error(error))
        else:
            self._send("taken" if kind == "add" else "checked", number)

    def _add(self, number: int, payload: bytes) -> None:
        name, prompt, params, options = pickle.loads(payload)
        self.steps.add(name, prompt, params, options)
        self._names[number], self._numbers[name] = name, number

    def _drop(self, number: int) -> None:
        if number in self._names:
            name = self._names.pop(number)
            del self._numbers[name]
            self.steps.abort(name)
            if not self.steps.engine.has_unfinished:  # no step will tell that its pages are free
                self._hand_out({})

    def _hand_out(self, made: dict[str, list[TokenOutput]]) -> None:
        """Send the outputs of a step, also none: that there was a step is a sign of life."""
        numbers, requests = self._numbers, self.steps.engine.requests
        started = [numbers[name] for name in self.steps.started(made)]
        sent = []
        for name, outputs in made.items():
            ended = name not in requests
            sent.append((numbers[name], ended, [output[1:] for output in outputs]))
            if ended:
                del self._names[numbers.pop(name)]
        self._send("step", tuple(self.steps.counts()), self.steps.began_ns, started, sent)

    def _check(self) -> None:
        self.steps.check_invariants()
        names = set(self._names.values())
        assert names == self._numbers.keys() == self.steps.engine.requests.keys(), "a request has nobody who waits"

    def _send(self, *message: object) -> None:
        self.connection.sendall(framed(*message))


def serve(socket_fd: int, traces_fd: int) -> int:
    """What the process does; its exit code.

    Args:
        socket_fd: of the connection to the process that started this one, which sends the engine's factory first.
        traces_fd: of a file for the traceback of a crash, or of a step that hangs.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # also sent to whole groups; the process that asks decides
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable(traces_fd)
    faulthandler.register(signal.SIGUSR1, traces_fd)
    connection, messages = socket.socket(fileno=socket_fd), Messages()
    threading.Thread(target=_end_with_the_other, args=(socket_fd,), name="other end", daemon=True).start()
    try:
        loop = _loop(connection, messages)
        if loop:
            loop.run()
    except BaseException as error:  # also a panic of somebody's compiled code
        connection.sendall(framed("died", packed_error(error)[1]))
        return 1
    return 0


def _loop(connection: socket.socket, messages: Messages) -> EngineLoop | None:
    """Make the engine and say so; None if the other end is closed, or has been told why there is no engine."""
    found: list[tuple] = []
    while not found:
        data = connection.recv(_AT_ONCE)
        if not data:
            return None
        found = messages.feed(data)
    try:
        loop = EngineLoop(connection, messages, pickle.loads(found[0][1])())
        described = loop.steps.description()
    except Exception as error:
        connection.sendall(framed("failed", *packed_error(error)))
        return None
    connection.sendall(framed("ready", pickle.dumps(described), tuple(loop.steps.counts())))
    return loop


def _end_with_the_other(socket_fd: int) -> None:
    """In a thread that sleeps: a step may be long, or never end, and the process that asks is gone."""
    watch = select.poll()
    watch.register(socket_fd, 0)  # hang-ups alone
    watch.poll()
    os._exit(0)
