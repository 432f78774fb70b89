"""Clients that go away, read slowly or stay idle, and requests that fail in mid-stream: no page is left behind."""

import json
import socket
import time

import openai
import pytest

from minilib.serving.server.limits import Limits
from tests.serving.server.api import MODEL, new_engine, read_all, running, slowed

LONG = {"model": MODEL, "prompt": "import os\n", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_a_client_that_goes_away_frees_its_pages(stream, many):
    with running(slowed(new_engine(max_sequences=4), 0.002)) as server:
        prompt = ["import os\n", "def f("] if many else "import os\n"
        with server.connect() as connection:
            server.post(connection, LONG | {"stream": stream, "prompt": prompt})
            server.until(lambda status: status.num_running and status.generated_tokens > 5)
            if stream:
                assert connection.recv(10)
        server.until_idle()
        assert server.engine.status().generated_tokens < 900
        assert server.metric("minilib_requests_aborted_total") == 1


def test_a_client_that_goes_away_from_the_queue():
    with running(slowed(new_engine(max_sequences=1), 0.002)) as server:
        with server.connect() as first, server.connect() as second:
            server.post(first, LONG | {"stream": True})
            server.until(lambda status: status.generated_tokens)
            server.post(second, LONG)
            server.until(lambda status: status.num_waiting)
            second.close()
            server.until(lambda status: not status.num_waiting)
            assert server.engine.status().num_running == 1
        server.until_idle()


def test_a_client_that_goes_away_while_its_prompt_is_computed():
    with running(slowed(new_engine(max_batch_tokens=16), 0.01)) as server:
        with server.connect() as connection:
            server.post(connection, LONG | {"prompt": [5] * 900, "max_tokens": 5})
            server.until(lambda status: status.num_running)
        server.until_idle()
        assert server.engine.status().generated_tokens == 0


def test_a_client_slower_than_its_stream_is_left():
    """It reads nothing: what is written fills the sockets, then the request is aborted; others never wait for it."""
    limits = Limits(slow_client_seconds=0.3)
    with running(new_engine(), limits=limits) as server:
        connections = []
        for _ in range(2):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((server.host, server.port))
            connections.append(connection)
            # logprobs make chunks large
            server.post(connection, LONG | {"stream": True, "logprobs": 5, "n": 8, "max_tokens": 700})
        assert server.client().completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens == 2
        give_up = time.monotonic() + 60
        while server.metric("minilib_requests_aborted_total") < 2:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        server.until_idle()
        assert server.metric("minilib_request_success_total") == 1
        for connection in connections:
            connection.close()


def test_a_thousand_idle_connections(server):
    connections = [server.connect() for _ in range(1000)]
    try:
        assert server.client().completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens == 2
        for connection in connections[::100]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        for connection in connections:
            connection.close()


def test_idle_connections_are_closed_in_the_end():
    with running(limits=Limits(keep_alive_seconds=1)) as server, server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_full_queue_says_when_to_come_back():
    with running(slowed(new_engine(max_sequences=1), 0.02), max_waiting=1) as server:
        with server.connect() as first, server.connect() as second:
            server.post(first, LONG)
            server.until(lambda status: status.generated_tokens)
            server.post(second, LONG | {"max_tokens": 2})
            server.until(lambda status: status.num_waiting)
            status, headers, body = server.ask("/v1/completions", LONG)
            assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(headers["Retry-After"]) <= 120
            assert server.refused("/v1/completions", LONG | {"prompt": ["a", "b"]})[0] == 429
            with pytest.raises(openai.RateLimitError):
                server.client().completions.create(model=MODEL, prompt="a")
            first.close()
            # the client waits as long as it was told, and comes back
            answer = server.client(max_retries=5).completions.create(model=MODEL, prompt="a", max_tokens=2)
            assert answer.usage.completion_tokens == 2
        server.until_idle()


def test_a_prompt_of_a_list_that_finds_the_queue_full_takes_the_others_with_it():
    with running(slowed(new_engine(max_sequences=1), 0.02), max_waiting=2) as server:
        with server.connect() as first:
            server.post(first, LONG)
            server.until(lambda status: status.generated_tokens)
            assert server.refused("/v1/completions", LONG | {"prompt": ["a"] * 5})[0] == 429
            server.until(lambda status: status.num_waiting == 0)
        server.until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream):
    with running(slowed(new_engine(), 0.01), limits=Limits(request_seconds=0.3)) as server:
        client = server.client(max_retries=5)
        options = {"model": MODEL, "prompt": "a", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        if stream:
            with pytest.raises(openai.APIError, match="longer than 0.3 s"):
                list(client.completions.create(stream=True, **options))
        else:
            with pytest.raises(openai.APIStatusError, match="longer than 0.3 s") as caught:
                client.completions.create(**options)
            assert caught.value.status_code == 408
        server.until_idle()
        assert server.metric("minilib_requests_aborted_total") == 1, "the client came again"


def failing(engine, after):
    """An engine that raises in the steps that come after so many, for whichever request runs."""
    forward, calls = engine._forward, []

    def raising(*arguments):
        calls.append(0)
        if len(calls) > after:
            raise RuntimeError("the model is ill")
        return forward(*arguments)

    engine._forward = raising
    return engine


@pytest.mark.parametrize("after", [0, 5])
def test_a_model_that_raises(after):
    with running(failing(new_engine(), after)) as server:
        options = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 50, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.InternalServerError, match="the model is ill"):
            server.client().completions.create(**options)
        with pytest.raises(openai.APIError, match="the model is ill"):
            list(server.client().completions.create(stream=True, **options))
        server.until_idle()
        assert server.ask("/health")[0] == 200


def test_an_error_in_mid_stream_is_an_event_and_the_end():
    with running(failing(new_engine(), 5)) as server:
        text = server.ask("/v1/completions", LONG | {"stream": True})[2].decode()
        events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
        assert [*map(len, events[:-1])] == [5] * (len(events) - 1) and len(events) > 1
        assert events[-1].keys() == {"error"} and events[-1]["error"]["code"] == "generation_failed"


def test_an_engine_that_has_stopped():
    with running() as server:
        server.engine.stop()
        for path in ("/health", "/ready"):
            status, headers, body = server.ask(path)
            assert (status, json.loads(body)["status"]) == (503, "stopped") and headers["Retry-After"]
        status, error = server.refused("/v1/completions", LONG)
        assert (status, error["code"], error["type"]) == (503, "engine_stopped", "service_unavailable_error")


def test_an_engine_that_stops_in_mid_stream():
    with running(slowed(new_engine(), 0.005)) as server:
        stream = server.client().completions.create(
            model=MODEL, prompt="a", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.engine.stop()
        with pytest.raises(openai.APIError, match="stopped before"):
            list(stream)
