#!/usr/bin/env bash
# HAProxy, as Debian configures it, does not pass the small chunks of a stream on as they come: it collects them for up to
# 200 ms, so tokens of a language model reach the client in bursts, and a client that has left is noticed as late. Nothing
# is called buffering in its configuration. Expected: a chunk that has come is passed on. Way round: `option http-no-delay`.
# Needs HAProxy 2.6 (Debian's package haproxy); the backend and the client are plain sockets.
. "$(dirname "$0")/environment.sh" h11==0.16.0
command -v haproxy > /dev/null || { echo "haproxy is not installed: this says nothing about the finding" >&2; exit 2; }

observe <<'EOF'
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

CHUNKS, made = 6, 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stream(door: socket.socket) -> None:
    """Answer each request with six chunks of 64 bytes, one every 15 ms."""
    global made
    while True:
        connection, _ = door.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for made in range(1, CHUNKS + 1):
            connection.sendall(b"40\r\n" + b"data: token".ljust(64) + b"\r\n")
            time.sleep(0.015)
        connection.sendall(b"0\r\n\r\n")
        connection.close()


def made_at_first_chunk(option: str) -> int:
    """Chunks that the backend had made when the first one reached the client."""
    port = free_port()
    lines = ["defaults", "mode http", "timeout connect 5s", "timeout client 5s", "timeout server 5s", option,
             "frontend door", f"bind 127.0.0.1:{port}", "default_backend models", "backend models",
             f"server one 127.0.0.1:{backend.getsockname()[1]}"]
    Path("haproxy.cfg").write_text("\n".join(lines) + "\n")
    proxy = subprocess.Popen(["haproxy", "-db", "-f", "haproxy.cfg"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                client = socket.create_connection(("127.0.0.1", port), timeout=5)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        received = b""
        while b"data: token" not in received:
            received += client.recv(65536)
        return made
    finally:
        proxy.kill()
        proxy.wait()


backend = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=stream, args=(backend,), daemon=True).start()
version = subprocess.run(["haproxy", "-v"], capture_output=True, text=True).stdout
print("HAProxy", re.search(r"version (\d+\.\d+)", version)[1])
for option in ("", "option http-no-delay"):
    found = made_at_first_chunk(option)
    print(f"{option or 'defaults'}: the first chunk came", "as it was made" if found == 1 else "after others were made")
EOF
expect <<'EOF'
HAProxy 2.6
defaults: the first chunk came after others were made
option http-no-delay: the first chunk came as it was made
EOF
