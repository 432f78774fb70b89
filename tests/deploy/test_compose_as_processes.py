"""The compose file without containers: its programs as processes of this machine, with free ports for its names."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from minilib.mechanisms.basics.child import child_environment
from tests.deploy.files import read
from tests.deploy.test_containers import OURS

PATIENCE = 120


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def commands():
    """(name, port, command) of each program, replicas first; names of containers become addresses of this machine."""
    services = read("compose.yaml")["services"]
    ports = dict(zip(OURS, free_ports(len(OURS)), strict=True))
    for name in OURS:
        words = [word.replace("--port=8000", f"--port={ports[name]}") for word in services[name]["command"]]
        for other, port in ports.items():
            words = [word.replace(f"http://{other}:8000", f"http://127.0.0.1:{port}") for word in words]
        yield name, ports[name], [word.replace("0.0.0.0", "127.0.0.1") for word in words]


def until_idle(port):
    """The router has counted all that has ended, so that the next request meets equal loads."""
    deadline = time.monotonic() + PATIENCE
    while re.search(r"^router_in_flight\{.*\} [1-9]", ask(port, "/metrics")[1].decode(), re.M):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(port, path, body=None):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body and json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return response.headers["x-replica"], response.read()


def until_ready(port, process):
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return ask(port, "/ready")
        except OSError as error:
            assert process.poll() is None and time.monotonic() < give_up, error
            time.sleep(0.1)


def test_two_replicas_and_a_router_serve_and_drain():
    processes, ports = {}, {}
    try:
        for name, port, command in commands():
            words = [sys.executable, "-m", *command]
            processes[name], ports[name] = subprocess.Popen(words, env=child_environment(OMP_NUM_THREADS="1")), port
        for name in OURS:
            until_ready(ports[name], processes[name])
        seen = {}
        for number in range(4):
            until_idle(ports["router"])
            prompt = (
                f"# {number}, a prompt of its own that is long enough for a block of text\n" * 2 + "def add(a, b):\n"
            )
            body = {"model": "pretrained", "prompt": prompt, "max_tokens": 4, "temperature": 0}
            answers = [ask(ports["router"], "/v1/completions", body) for _ in range(2)]
            (replica, first), (again, second) = answers
            assert replica == again, "the second goes where the first was computed"
            usage = [json.loads(answer)["usage"] for answer in (first, second)]
            assert usage[1]["prompt_tokens_details"]["cached_tokens"] > 0 and usage[0]["completion_tokens"] == 4
            seen[replica] = seen.get(replica, 0) + 1
        assert seen == {"replica-0": 2, "replica-1": 2}
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        assert {name: process.wait(PATIENCE) for name, process in processes.items()} == dict.fromkeys(OURS, 0)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
