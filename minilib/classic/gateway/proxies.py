"""Proxies that are compared: nobody, this gateway, nginx and HAProxy, each before the same backends on this machine.

nginx and HAProxy are child processes in the foreground with a generated configuration in a temporary folder. They get a
port that was free a moment before, since neither can say which one it was given; a start that fails is tried again.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from minilib.classic.gateway.gateway import Gateway
from minilib.classic.gateway.rules import GatewayLimits
from minilib.classic.http.wire import HOST
from minilib.mechanisms.balancing import RoundRobin

PROXIES = ("nobody", "gateway", "nginx", "haproxy")
Options = Mapping[str, str]
START_WITHIN, STOP_WITHIN, TRIES = 5.0, 1.0, 3
SLOW = 10  # seconds that a head may take by default
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ worker_connections 512; }}
http {{
    access_log off; default_type text/plain;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    client_header_timeout {slow}s; client_body_timeout {slow}s;
    upstream backends {{ {servers} {upstream} }}
    server {{ listen {host}:{port}; location / {{ proxy_pass http://backends; {location} }} }}
}}
"""
HAPROXY = """
global
    maxconn 512
    nbthread 1
defaults
    mode http
    timeout connect 200ms
    timeout client 10s
    timeout server 10s
    timeout http-request {slow}s
frontend front
    bind {host}:{port}
    default_backend backends
backend backends
    {location}
{servers}
"""


class RunningProxy(NamedTuple):
    """A proxy that runs.

    Attributes:
        port: that it listens on.
        move: send new requests to backends on other ports, as an operator does while requests run: a new configuration
            for nginx and HAProxy, add and drain for the gateway.
    """

    port: int
    move: Callable[[Sequence[int]], None]


def available() -> list[str]:
    """Names of the proxies that are on this machine."""
    return [name for name in PROXIES if name in ("nobody", "gateway") or shutil.which(name)]


@asynccontextmanager
async def real_proxy(
    name: str, ports: Sequence[int], options: Options | None = None, **ours: object
) -> AsyncIterator[RunningProxy]:
    """Run a proxy before backends on these ports of this machine.

    Args:
        name: one of PROXIES; "nobody" is the first backend itself.
        ports: of the backends.
        options: of nginx and HAProxy: "location" and "upstream" are lines of configuration, "server" is added to each
            backend's line, "slow" is the number of seconds that a request may take to arrive.
        **ours: options of Gateway.

    Raises:
        RuntimeError: if the proxy is not there or does not start.
    """
    options = options or {}
    if name == "nobody":
        yield RunningProxy(ports[0], lambda moved: None)
    elif name == "gateway":
        limits = GatewayLimits(head_within=float(options.get("slow", SLOW)))
        gateway = Gateway(RoundRobin(), [(HOST, port) for port in ports], **{"limits": limits, **ours})

        def move(moved: Sequence[int]) -> None:
            old = range(len(gateway.backends.pools))
            for port in moved:
                gateway.backends.add(HOST, port)
            for target in old:
                gateway.backends.drain(target)

        try:
            yield RunningProxy(await gateway.start(), move)
        finally:
            await gateway.kill()
            gateway.check_invariants()
    else:
        with tempfile.TemporaryDirectory() as folder:
            port, process = await _start(name, Path(folder), ports, options)

            def move(moved: Sequence[int]) -> None:
                _configure(name, Path(folder), port, moved, options)
                process.send_signal(signal.SIGHUP if name == "nginx" else signal.SIGUSR2)

            try:
                yield RunningProxy(port, move)
            finally:
                await _stop(process)


async def _start(
    name: str, folder: Path, ports: Sequence[int], options: Options
) -> tuple[int, asyncio.subprocess.Process]:
    if shutil.which(name) is None:
        raise RuntimeError(f"{name} is not installed")
    for _ in range(TRIES):
        with socket.create_server((HOST, 0)) as probe:
            port = probe.getsockname()[1]
        config = str(_configure(name, folder, port, ports, options))
        command = [name, "-c", config, "-p", str(folder)] if name == "nginx" else [name, "-W", "-f", config]
        with (folder / "output").open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=output, stderr=output, start_new_session=True
            )
        if await _accepts(port, process):
            return port, process
        await _stop(process)
    raise RuntimeError(f"{name} did not start: {(folder / 'output').read_text(errors='replace')[-500:]}")


async def _accepts(port: int, process: asyncio.subprocess.Process) -> bool:
    for _ in range(int(START_WITHIN / 0.01)):
        if process.returncode is not None:
            return False
        with suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            await writer.wait_closed()
            return True
        await asyncio.sleep(0.01)
    return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End the process and its workers, whatever they are doing; who is asked first leaves no orphan behind."""
    with suppress(ProcessLookupError, TimeoutError):
        process.terminate()
        await asyncio.wait_for(process.wait(), STOP_WITHIN)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _configure(name: str, folder: Path, port: int, ports: Sequence[int], options: Options) -> Path:
    server, location = options.get("server", ""), options.get("location", "")
    if name == "nginx":
        servers = " ".join(f"server {HOST}:{each} {server};" for each in ports)
        user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
        text = NGINX.format(folder=folder, user=user, host=HOST, port=port, servers=servers, location=location,
                            upstream=options.get("upstream", ""), slow=options.get("slow", SLOW))  # fmt: skip
    else:
        servers = "\n".join(f"    server s{number} {HOST}:{each} {server}" for number, each in enumerate(ports))
        text = HAPROXY.format(host=HOST, port=port, servers=servers, location=location.replace(";", "\n    "),
                              slow=options.get("slow", SLOW))  # fmt: skip
    config = folder / "config"
    config.write_text(text)
    return config
