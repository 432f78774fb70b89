"""`make lab` for real: a server that answers, at the address it prints, and nothing left of it afterwards."""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request

import psutil
import pytest
from jupyter_server.auth import passwd

from minilib.numbers.records import ROOT
from tools import lab

OPTIONS = ["--no-browser", "--ServerApp.port=0"]


def start(*options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.lab", *options]
    environment = {**os.environ, **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def address(process: subprocess.Popen) -> str:
    """The address that it prints."""
    text = ""
    while not (found := re.search(r"https?://\S+", text)):
        line = process.stdout.readline()
        assert line, f"it ended early: {process.stderr.read()}"
        text += line
    return found.group()


def ask(url: str) -> int:
    """Status of the answer, by no proxy and with any certificate."""
    trusting = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    with urllib.request.build_opener(urllib.request.ProxyHandler({}), trusting).open(url, timeout=10) as response:
        return response.status


def test_lab_answers_at_the_address_it_prints_and_stops_without_a_trace():
    process = start(*OPTIONS)
    try:
        url = address(process)
        assert "/lab/tree/chapters/00_map.ipynb" in url
        assert ask(url) == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("setting", ["password", "proxy", "https"])
def test_lab_starts_under_the_readers_own_settings(setting, tmp_path):
    config, environment = {}, {}
    if setting == "password":
        config = {"PasswordIdentityProvider": {"hashed_password": passwd("secret", "sha1")}}
    elif setting == "proxy":  # nobody listens at port 9
        environment = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTP_PROXY", "all_proxy")}
        environment |= {"no_proxy": "", "NO_PROXY": ""}
    else:
        config = {"ServerApp": dict(zip(("keyfile", "certfile"), own_certificate(tmp_path), strict=True))}
    (tmp_path / "jupyter_server_config.json").write_text(json.dumps(config))
    process = start(*OPTIONS, JUPYTER_CONFIG_DIR=str(tmp_path), **environment)
    try:
        url = address(process)
        assert url.startswith("https:" if setting == "https" else "http:")
        assert ask(url) == 200
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=15) == 0
    finally:
        process.kill()
        process.wait()


def own_certificate(folder) -> list[str]:
    """Files of a key and of a certificate that the key has signed itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make a certificate with")
    files = [str(folder / name) for name in ("key.pem", "certificate.pem")]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = ["openssl", "req", "-x509", *curve, "-subj", "/CN=localhost", "-keyout", files[0], "-out", files[1]]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return files


def test_a_server_that_cannot_start_says_why():
    process = start(*OPTIONS, "--ServerApp.ip=no-such-address.invalid")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "JupyterLab did not start" in errors


def test_options_of_the_reader_come_last():
    assert lab.command(["--port", "1"])[-2:] == ["--port", "1"]
