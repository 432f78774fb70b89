"""The lighthouse's sockets: what comes at one moment from a process and from the one that takes its place."""

import json
import socket
import threading
from pathlib import Path

from minilib.operations.elastic.lighthouse import TICK, Lighthouse


def joined(path: Path, replica: int, address: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(10)
    connected.connect(str(path))
    tell(connected, kind="join", replica=replica, address=address)
    return connected


def tell(connected: socket.socket, **message: object) -> None:
    connected.sendall(json.dumps(message).encode() + b"\n")


def test_an_older_process_that_speaks_as_it_is_replaced_does_not_end_the_lighthouse(tmp_path):
    lighthouse = Lighthouse(tmp_path / "door", frozenset({0, 1}), silence=60.0, patience=60.0)
    try:
        older, other = (joined(lighthouse.path, replica, f"first {replica}") for replica in (1, 0))
        newer = socket.socket(socket.AF_UNIX)
        newer.connect(str(lighthouse.path))
        tell(older, kind="ready", step=0)
        assert until(lambda: lighthouse.ready == {1})
        with lighthouse._changed:
            threading.Event().wait(4 * TICK)  # now its thread waits here, and reads what comes in one look
            tell(newer, kind="join", replica=1, address="second 1")
            tell(older, kind="beat")
        tell(other, kind="ready", step=0)
        tell(newer, kind="ready", step=0)
        newer.settimeout(10)
        assert b'"kind": "quorum"' in received(newer, b"quorum")
        assert lighthouse._thread.is_alive()
    finally:
        lighthouse.close()
        for each in (older, other, newer):
            each.close()
    assert not any(thread.name == "lighthouse" for thread in threading.enumerate())


def received(connected: socket.socket, what: bytes) -> bytes:
    data = b""
    while what not in data:
        piece = connected.recv(65536)
        assert piece, "the lighthouse hung up"
        data += piece
    return data


def until(condition) -> bool:
    waited = threading.Event()
    return any(condition() or waited.wait(0.02) for _ in range(500))
