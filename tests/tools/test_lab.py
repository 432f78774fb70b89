"""`make lab` for real: a server that answers, at the address it prints, and nothing left of it afterwards."""

import os
import re
import signal
import subprocess
import sys
import urllib.request

import psutil

from minilib.numbers.records import ROOT
from tools import lab

OPTIONS = ["--no-browser", "--ServerApp.port=0"]


def start(*options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.lab", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_lab_answers_at_the_address_it_prints_and_stops_without_a_trace():
    process = start(*OPTIONS)
    try:
        text = ""
        while not (found := re.search(r"http://\S+", text)):
            line = process.stdout.readline()
            assert line, f"it ended early: {process.stderr.read()}"
            text += line
        url = found.group()
        assert "/lab/tree/chapters/00_map.ipynb" in url
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.status == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        process.kill()
        process.wait()


def test_a_server_that_cannot_start_says_why():
    process = start(*OPTIONS, "--ServerApp.ip=no-such-address.invalid")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "JupyterLab did not start" in errors


def test_options_of_the_reader_come_last():
    assert lab.command(["--port", "1"])[-2:] == ["--port", "1"]
