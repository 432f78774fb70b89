"""Kernels and sheets for the graders' many runs: forks of one process that has loaded ipykernel and torch already.

A kernel of its own takes most of two seconds to start, half of that for torch, and an exercise takes some twenty.
Jupyter starts `ask_for_kernel.py` in a kernel's place, which hands the server its own files, environment and folder,
passes signals on, and ends when the kernel does. When it is killed, its kernel ends too. sheet_runner.py asks for one
fork, too. All of them share one fork server for their ranks.

Usage: python -m tests.graders.preloaded SOCKET
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

START_TIMEOUT = 120.0  # seconds for the server to load torch, on a machine that is busy with other things
# Triton decides when it is loaded, and exercises interpret it on any machine. Threads would wait for each other, since
# other tests need the cores as well.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ASK = Path(__file__).with_name("ask_for_kernel.py")
SHEETS = "sheets"  # asks for a process that runs sheets, not for a kernel


@contextlib.contextmanager
def preloaded_kernels() -> Iterator[str]:
    """While the block runs, kernels that Jupyter starts from this process are forks of one server, at this socket."""
    with tempfile.TemporaryDirectory(prefix="kernels-") as name:
        folder = Path(name)
        spec = folder / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        door = str(folder / "door")
        command = [sys.executable, "-S", "-E", str(ASK), door, "-f", "{connection_file}"]
        kernel = {"argv": command, "display_name": "Python 3", "language": "python", "env": ENVIRONMENT}
        spec.write_text(json.dumps(kernel))
        server = subprocess.Popen([sys.executable, "-m", "tests.graders.preloaded", door], stdout=subprocess.PIPE)
        path = os.pathsep.join(filter(None, [name, os.environ.get("JUPYTER_PATH")]))
        try:
            spoke, _, _ = select.select([server.stdout], [], [], START_TIMEOUT)
            assert spoke and server.stdout.readline() == b"ready\n", "the server of kernels did not start"
            with mock.patch.dict(os.environ, JUPYTER_PATH=path):
                yield door
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def serve(door: str) -> None:
    """Fork for whoever asks; what is loaded here is what every notebook of the course loads first."""
    # Read at import: no parent to watch, for the other end of the connection is.
    os.environ["JPY_PARENT_PID"] = "1"
    os.environ |= ENVIRONMENT
    import ipykernel.kernelapp  # noqa: F401
    import matplotlib_inline.backend_inline  # noqa: F401
    import numpy  # noqa: F401
    import torch._dynamo  # noqa: F401 - optimizers load it, a second's work, and it loads Triton
    import torch.distributed  # noqa: F401

    from minilib.ranks.launch import local

    local.server.ensure_running()  # one for the ranks of all forks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for kernels: the asking process sees them end
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(door)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                local.server.ensure_running = lambda: None  # only the parent of it may ask
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """In the fork: take over the files of the process that asked, and be what it asked for."""
    message, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    while not message.endswith(b"\0"):
        message += connection.recv(2**20)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = json.loads(message[:-1])
    if asked == SHEETS:
        from tests.graders import sheet_runner

        sheet_runner.serve(connection)
        os._exit(0)
    _become_kernel(connection, asked)


def _become_kernel(connection: socket.socket, asked: dict) -> None:
    """Take over environment, folder and arguments of the process that asked, and be its kernel."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.argv = ["ipykernel_launcher", *asked["arguments"]]
    connection.sendall(os.getpid().to_bytes(4, "little"))
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()

    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
    os._exit(0)


def _end_with(connection: socket.socket) -> None:
    connection.recv(1)  # nothing comes until the other side is gone
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1])
