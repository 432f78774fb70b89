"""Stands for a kernel that the server of preloaded.py forks; loads little, because it is started for every kernel.

Usage: ask_for_kernel.py SOCKET ARGUMENTS … (of ipykernel)
"""

import json
import os
import signal
import socket
import sys

_, door, *arguments = sys.argv
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(door)
    asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
    message = json.dumps(asked).encode() + b"\0"
    sent = socket.send_fds(connection, [message], [0, 1, 2])
    connection.sendall(message[sent:])
    kernel = int.from_bytes(connection.recv(4), "little")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(kernel, number))
    connection.recv(1)  # nothing comes until the kernel is gone
