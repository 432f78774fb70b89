"""Start JupyterLab at the map, print its address, and stop it cleanly.

Usage: python -m tools.lab [options of `jupyter lab`, such as --no-browser --port 9999]
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "build" / "lab.log"
START_TIMEOUT = 60.0  # seconds
STOP_TIMEOUT = 10.0
ANSWER_TIMEOUT = 2.0


def main() -> int:
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(__doc__.strip())
        return 0
    signal.signal(signal.SIGTERM, _interrupt)  # `kill` ends it as Ctrl-C does
    LOG.parent.mkdir(exist_ok=True)
    print("starting JupyterLab …", flush=True)
    with LOG.open("w") as log:
        server = subprocess.Popen(command(sys.argv[1:]), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        url = wait_for(server)
        if url is None:
            print(f"JupyterLab did not start; the end of {LOG.relative_to(ROOT)}:\n{_tail()}", file=sys.stderr)
            return 1
        print(f"JupyterLab is running at\n\n    {url}\n\nstop it with Ctrl-C", flush=True)
        server.wait()
        print("JupyterLab has stopped")
        return 0
    except KeyboardInterrupt:
        print("\nstopping JupyterLab")
        return 0
    finally:
        stop(server)


def command(options: list[str]) -> list[str]:
    """The command line that starts the server with the reader's own options last."""
    words = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.default_url=/lab/tree/chapters/00_map.ipynb",
        "--ServerApp.log_level=WARN",
        # only the Validate button is used here; nbgrader's tools for instructors want a shared course folder
        *(
            f"--ServerApp.jpserver_extensions=nbgrader.server_extensions.{tool}=False"
            for tool in ("assignment_list", "course_list", "formgrader")
        ),
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        print("you are root: JupyterLab is started with --allow-root")
        words.append("--allow-root")
    return [*words, *options]


def wait_for(server: subprocess.Popen) -> str | None:
    """The server's address, token included, once it answers; None if it ends or takes longer than a minute."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.poll() is None:
        info = _announced(server.pid)
        if info is not None and _answers(info):
            token = f"?token={info['token']}" if info["token"] else ""
            return f"{info['url']}lab/tree/chapters/00_map.ipynb{token}"
        time.sleep(0.2)
    return None


def stop(server: subprocess.Popen) -> None:
    """End the server and its kernels; by force if it does not listen."""
    if server.poll() is not None:
        return
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _announced(pid: int) -> dict | None:
    """What a server has written of itself for others to find; jupyter_server, which reads it too, loads for a second.

    It may be about to write it.
    """
    path = Path(jupyter_runtime_dir()) / f"jpserver-{pid}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _answers(info: dict) -> bool:
    """True once the server itself, asked without a proxy, says anything: a login page or a refusal will do."""
    if info.get("sock"):
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(info["sock"]) == 0
    connection = _connection(info)
    try:
        connection.request("GET", f"{info['base_url']}api/status")
        return connection.getresponse().status > 0
    except (http.client.HTTPException, ssl.SSLError, ConnectionResetError):  # it listens, to another protocol
        return True
    except OSError:
        return False
    finally:
        connection.close()


def _connection(info: dict) -> http.client.HTTPConnection:
    everywhere = ("*", "0.0.0.0", "::")
    host = "localhost" if info["hostname"] in everywhere else info["hostname"]
    if not info["secure"]:
        return http.client.HTTPConnection(host, info["port"], timeout=ANSWER_TIMEOUT)
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE  # people sign their own certificates
    return http.client.HTTPSConnection(host, info["port"], timeout=ANSWER_TIMEOUT, context=unverified)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _tail(lines: int = 12) -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
