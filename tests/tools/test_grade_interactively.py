"""What a reader does at the terminal and in JupyterLab while cells run, with processes as the reader starts them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import nbformat
import psutil
import pytest

from tests.tools import small_exercise
from tools.grading.cells import by_grade_id
from tools.grading.course import ROOT

SOLUTION = ROOT / "solutions" / "01_numbers" / "01_numbers.ipynb"


def own_kernels():
    """The environment of a reader, whose kernels are no forks."""
    return {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}


def test_ctrl_c_ends_it_and_leaves_nothing_running(tmp_path):
    notebook, started = nbformat.read(SOLUTION, as_version=4), tmp_path / "started"
    by_grade_id(notebook.cells)["task_1"].source = f"open({str(started)!r}, 'w').close()\nwhile True: pass"
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    words = [sys.executable, "-m", "tools.grade", "--ex", "01_numbers", "--nb", str(tmp_path / "mine.ipynb")]
    with subprocess.Popen(words, cwd=ROOT, env=own_kernels(), stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        kernels = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        assert "not graded: interrupted" in run.communicate(timeout=30)[1]
    assert run.returncode == 2
    assert kernels
    assert not psutil.wait_procs(kernels, timeout=10)[1]


@pytest.fixture
def server(tmp_path):
    """A Jupyter server with the repository's nbgrader settings, but for the time limit; a function that validates."""
    config = (ROOT / "nbgrader_config.py").read_text()
    (tmp_path / "nbgrader_config.py").write_text(config.replace("TIMEOUT = 30", "TIMEOUT = 2"))
    words = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--port=0"]
    words.append("--IdentityProvider.token=t")
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(words, cwd=tmp_path, env=own_kernels(), stdout=output, stderr=output) as run,
    ):
        url = address(log)

        def validate(notebook):
            nbformat.write(notebook, tmp_path / "mine.ipynb")
            return json.loads(ask(f"{url}assignments/validate", {"path": "mine.ipynb"}))

        yield validate
        run.terminate()
        run.wait(timeout=30)


def address(log):
    """Where a server listens. It says so before it does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if found := re.search(r"http://127.0.0.1:\d+/", log.read_text()):
            with contextlib.suppress(urllib.error.URLError):
                ask(f"{found[0]}api/status")
                return found[0]
    raise TimeoutError(log.read_text())


def ask(url, form=None):
    data = urllib.parse.urlencode(form).encode() if form else None
    request = urllib.request.Request(url, data, {"Authorization": "token t"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def test_the_validate_button_passes_fails_and_ends_an_endless_loop(server, tmp_path):
    small_exercise.save(tmp_path)
    notebook = small_exercise.released("small", tmp_path)
    cells = by_grade_id(notebook.cells)
    assert len(server(notebook)["value"]["failed"]) == 2
    for name, source in small_exercise.RIGHT.items():
        cells[name].source = source
    assert server(notebook) == {"success": True, "value": {}}
    cells["task_1"].source = "def double(x):\n    while True: pass"
    (failed,) = server(notebook)["value"]["failed"]
    assert "stopped: is there an endless loop?" in failed["raw_error"]
