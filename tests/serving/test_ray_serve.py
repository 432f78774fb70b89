"""Replicas as an application of Ray Serve, on a cluster of this machine alone; skipped without ray."""

import json
import os
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed; it is the extra ray")
serve = pytest.importorskip("ray.serve", reason="ray is installed without serve")

from pydantic import ValidationError  # noqa: E402 - only where there is ray

from minilib.mechanisms.basics.child import SOURCE  # noqa: E402
from minilib.serving.llm import LLM  # noqa: E402
from minilib.serving.ray_serve import ServeOptions, application  # noqa: E402
from minilib.serving.request import SamplingParams  # noqa: E402

PATIENCE = 180
PROMPT, TOKENS = "def add(a, b):\n", 8


def start():
    """Ray gives its processes 30 seconds, which a busy machine may not have the first time."""
    variables = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    options = {"num_cpus": 8, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 10**8}
    for left in range(3, -1, -1):
        try:
            ray.init(runtime_env={"env_vars": variables}, _node_ip_address="127.0.0.1", **options)
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose HTTP proxy listens on loopback; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    start()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def run(cluster, request):
    """Run an application with these options until the test ends; its name is new, for Serve's proxy keeps the router
    of the first application of a name."""
    name = request.node.name

    def run(**options):
        serve.run(application(ServeOptions(num_threads=1, num_pages=64, **options)), name=name)
        return cluster

    yield run
    serve.delete(name)


def post(url, body, **headers):
    """Status, name of the replica, and body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"Content-Type": "application/json"} | named
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.headers["x-replica"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["x-replica"], error.read()


def asked(**options):
    return {"model": "pretrained", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0} | options


def expected():
    return LLM.load(num_pages=64).generate([PROMPT], SamplingParams(max_tokens=TOKENS, temperature=0))[0][0].text


def test_replicas_answer_as_the_engine_does_and_share_the_requests(run):
    url = run(num_replicas=2)
    text, seen = expected(), []
    for _ in range(20):
        status, replica, body = post(url, asked())
        assert status == 200 and json.loads(body)["choices"][0]["text"] == text
        seen.append(replica)
    assert len(set(seen)) == 2
    events = post(url, asked(stream=True))[2].decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert "".join(parts) == text and len(parts) > 1
    status, _, body = post(url, asked(model="another"))
    assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"


def test_sessions_stay_where_they_are(run):
    url = run(num_replicas=2, by_session=True)
    homes = {}
    for _ in range(3):
        for session in range(8):
            status, replica, _ = post(url, asked(max_tokens=1), x_session_id=f"session-{session}")
            assert status == 200
            homes.setdefault(session, set()).add(replica)
    assert all(len(replicas) == 1 for replicas in homes.values()), homes
    assert len(set.union(*homes.values())) == 2


def test_a_replica_that_goes_finishes_what_it_has(run, request):
    url = run(num_replicas=1, drain_seconds=60)
    done = {}
    long = asked(max_tokens=100, ignore_eos=True, stream=True)
    thread = threading.Thread(target=lambda: done.update(answer=post(url, long)))
    thread.start()
    give_up = time.monotonic() + PATIENCE
    while not metric(url, "minilib_num_requests_running"):
        assert time.monotonic() < give_up and not done
    serve.delete(request.node.name)
    thread.join(PATIENCE)
    status, _, body = done["answer"]
    assert status == 200 and body.endswith(b"data: [DONE]\n\n") and body.count(b"data: ") > 2


def metric(url, name):
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split()[0] == name)


@pytest.mark.parametrize("options", [{"num_replicas": 0}, {"replicas": 2}, {"max_ongoing_requests": 0}])
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        ServeOptions(**options)


def test_at_most_is_not_below_at_least():
    with pytest.raises(ValueError, match="max_replicas=1 is below num_replicas=2"):
        application(ServeOptions(num_replicas=2, max_replicas=1))


def test_a_range_of_replicas_is_scaled_by_requests():
    scaling = application(
        ServeOptions(num_replicas=2, max_replicas=5)
    )._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 8)
