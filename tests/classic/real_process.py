"""Real processes with anonymous memory: each reads, writes, forks and exits when the driver says so.

Run as a script, it is the first of them. Every process, forked ones as well, has a connection of its own to the driver.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys

TIMEOUT = 60


class RealProcesses:
    """The driver. Processes are named; the first one is there from the beginning."""

    def __init__(self, folder, num_bytes, first="0"):
        path = str(folder / "socket")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.listener.settimeout(TIMEOUT)
        self.script = subprocess.Popen([sys.executable, "-I", __file__, path, str(num_bytes)])
        self.connections = {first: self._accept()}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for connection in self.connections.values():
            connection.close()  # at the end of its input a process exits
        self.listener.close()
        try:
            self.script.wait(TIMEOUT)
        finally:
            self.script.kill()

    def _accept(self):
        connection, _ = self.listener.accept()
        connection.settimeout(TIMEOUT)
        return connection.makefile("rw")

    def _ask(self, name, *request):
        stream = self.connections[name]
        stream.write(json.dumps(request) + "\n")
        stream.flush()
        return json.loads(stream.readline())

    def read(self, name, address, count):
        return bytes.fromhex(self._ask(name, "read", address, count))

    def write(self, name, address, data):
        self._ask(name, "write", address, data.hex())

    def fork(self, name, child):
        self._ask(name, "fork")
        self.connections[child] = self._accept()

    def exit(self, name):
        self._ask(name, "exit")
        self.connections.pop(name).close()


def serve(path, num_bytes):
    """Obey the driver until it says exit, or is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    stream = connect(path)
    while line := stream.readline():
        action, *arguments = json.loads(line)
        answer = None
        if action == "read":
            address, count = arguments
            answer = memory[address : address + count].hex()
        elif action == "write":
            address, data = arguments[0], bytes.fromhex(arguments[1])
            memory[address : address + len(data)] = data
        elif action == "fork" and os.fork() == 0:
            stream = connect(path)
            continue
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
        if action == "exit":
            break
    os._exit(0)


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection.makefile("rw")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
