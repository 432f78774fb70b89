"""python -m minilib.serving.server, as somebody starts it: an engine in a process of its own, curl, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from minilib.model.stored.files import PRETRAINED
from minilib.serving.server import __main__ as command_line
from tests.serving.server.api import PATIENCE, alone

CURL = shutil.which("curl")
LONG = {"model": "pretrained", "prompt": "import os\n", "max_tokens": 250, "temperature": 0, "ignore_eos": True}


@contextmanager
def started(*arguments):
    """The process and its address, once it is ready; afterwards no process of its own is left."""
    command = [sys.executable, "-m", "minilib.serving.server", "--port", "0", "--num-pages", "128", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINILIB_API_KEY": "secret"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    family = [psutil.Process(process.pid)]
    lines = []
    timer = threading.Timer(3 * PATIENCE, process.kill)
    timer.start()
    try:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("curl "):
                break
        else:
            raise AssertionError("".join(lines))
        family += family[0].children(recursive=True)
        yield process, next(line.split()[0] for line in lines if " serves " in line)
    finally:
        timer.cancel()
        process.kill()
        process.communicate(timeout=PATIENCE)
        gone, alive = psutil.wait_procs(family, timeout=10)
        for each in alive:
            each.kill()
        assert not alive, "a process was left behind"


def curl(url, body=None, *options, key="secret"):
    """Status and body, as curl has them."""
    if CURL is None:
        pytest.skip("no curl")
    sent = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body is not None else []
    sent += ["-H", f"Authorization: Bearer {key}", "--max-time", str(PATIENCE), "-w", "\n%{http_code}"]
    command = [CURL, "-s", "-N", *sent, *options, url]
    text, _, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    return int(status), text


def streaming(url, body):
    """A thread that reads a stream, and the list that its status and text come into."""
    found = []
    thread = threading.Thread(target=lambda: found.append(curl(url + "/v1/completions", body | {"stream": True})))
    thread.start()
    return thread, found


def test_an_engine_in_its_own_process_serves_curl_and_drains():
    with started("--name", "a-1", "--drain-seconds", "300") as (process, url):
        status, text = curl(url + "/v1/completions", LONG | {"max_tokens": 20}, "-i")
        head, _, body = text.replace("\r\n", "\n").partition("\n\n")
        assert status == 200 and "x-replica: a-1" in head
        assert json.loads(body)["choices"][0]["text"] == alone("import os\n", max_tokens=20, temperature=0)[1]
        assert curl(url + "/v1/models", key="wrong")[0] == 401
        assert curl(url + "/ready")[0] == 200
        loaded = [mapped.path for mapped in psutil.Process(process.pid).memory_maps()]
        assert not [path for path in loaded if "/torch/" in path or "/numpy/" in path]

        reader, streamed = streaming(url, LONG)
        give_up = time.monotonic() + PATIENCE
        while "minilib_num_requests_running 1.0" not in curl(url + "/metrics")[1]:
            assert time.monotonic() < give_up and reader.is_alive(), "the stream ended too soon to see it drained"
        process.send_signal(signal.SIGTERM)
        while curl(url + "/ready")[0] == 200:
            assert time.monotonic() < give_up
        refused, text = curl(url + "/v1/completions", LONG)
        assert (refused, json.loads(text)["error"]["code"]) == (503, "engine_draining")
        reader.join(PATIENCE)
        assert process.wait(PATIENCE) == 0
    ((status, text),) = streamed
    assert status == 200 and text.rstrip().endswith("data: [DONE]")
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    said = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert said == alone("import os\n", max_tokens=250, temperature=0, ignore_eos=True)[1]


def test_only_the_process_of_the_engine_loads_torch():
    code = """if True:
        import sys
        from minilib.serving.server.__main__ import parser, server_of
        server_of(parser().parse_args(["--port", "0"]))
        print({"torch", "numpy", "minilib"} & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "{'minilib'}\n", done.stdout + done.stderr


def test_a_second_signal_ends_at_once():
    with started("--drain-seconds", "50") as (process, url):
        reader, streamed = streaming(url, LONG | {"n": 16})
        while "minilib_num_requests_running 16.0" not in curl(url + "/metrics")[1]:
            assert reader.is_alive(), "the stream ended too soon"
        process.send_signal(signal.SIGTERM)
        while curl(url + "/ready")[0] == 200:
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        reader.join(PATIENCE)
    assert '"finish_reason": "length"' not in streamed[0][1]


def test_an_engine_that_is_killed_is_a_503_and_a_restart():
    with started() as (process, url):
        psutil.Process(process.pid).children(recursive=True)[-1].kill()  # the one that was started last
        give_up, seen = time.monotonic() + PATIENCE, set()
        while not ({503, 200} <= seen and curl(url + "/ready")[0] == 200):
            status, text = curl(url + "/v1/completions", LONG | {"max_tokens": 2})
            assert status in (200, 503), text
            seen.add(status)
            assert time.monotonic() < give_up, seen
        assert curl(url + "/health")[0] == 200
        assert "minilib_engine_restarts_total 1.0" in curl(url + "/metrics")[1]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--model", "/nowhere"], "there is no such folder"),
        (["--model", str(PRETRAINED.parent)], "tokenizer.json"),
        (["--port", "65536"], "up to 65535, got 65536"),
        (["--port", "-1"], "got -1"),
        (["--max-model-len", "0"], "--max-model-len is at least 1, got 0"),
        (["--num-threads", "0"], "--num-threads is at least 1, got 0"),
        (["--drain-seconds", "-1"], "--drain-seconds is 0 or more, got -1"),
        (["--drain-seconds", "nan"], "--drain-seconds is 0 or more, got nan"),
        (["--name", "a\nb: c"], "--name becomes a header"),
        (["--name", ""], "--name becomes a header"),
        (["--in-process", "--num-pages", "0"], "num_"),
        (["--max-body-bytes", "0"], "body_bytes must be above 0"),
    ],
)
def test_what_cannot_be_served_is_told(arguments, told, caplog):
    assert command_line.serve_from(arguments) == 2
    assert told in caplog.text
