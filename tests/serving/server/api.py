"""Servers for the tests beside this file: one small model behind HTTP, in a thread, on a free port."""

import functools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import openai

from minilib.model import tokenizer, weights
from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from minilib.serving.server.limits import Limits
from minilib.serving.server.serve import DrainingServer
from minilib.serving.server.service import Service
from minilib.serving.server.templates import ChatTemplate

MODEL = "tiny"
PATIENCE = 60  # seconds after which a test fails that waits


@functools.cache
def parts():
    """The model that comes with the library, and its tokenizer."""
    return weights.load(weights.PRETRAINED).eval(), tokenizer.load(weights.PRETRAINED)


def new_engine(**options):
    model, texts = parts()
    options = {"num_pages": 128, "tokenizer": texts, "eos_token_id": texts.token_to_id(tokenizer.END)} | options
    return Engine(model, **options)


def alone(prompt, **params):
    """Token ids and text that the bare engine makes of a prompt, and the outputs."""
    engine = new_engine()
    ids = parts()[1].encode(prompt).ids if isinstance(prompt, str) else prompt
    engine.add_request("alone", ids, SamplingParams(**params))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return [output.token_id for output in outputs], "".join(output.text for output in outputs), outputs


class Running:
    """A server that listens, and what the tests ask of it."""

    def __init__(self, server, engine):
        self.server, self.engine, self.url = server, engine, server.address
        self.host, port = self.url.removeprefix("http://").split(":")
        self.port = int(port)

    def client(self, **options):
        options = {"max_retries": 0, "timeout": PATIENCE, "api_key": "none"} | options
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    def ask(self, path, body=None, headers=None, method=None):
        """Status, headers and body of a response."""
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        headers = ({"Content-Type": "application/json"} if body is not None else {}) | (headers or {})
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def refused(self, path, body=None, **options):
        """Status and error of a response that must be an error as OpenAI's API has it."""
        status, headers, text = self.ask(path, body, **options)
        assert status >= 400, text
        assert headers["Content-Type"] == "application/json"
        document = json.loads(text)
        assert document.keys() == {"error"}
        assert document["error"].keys() == {"message", "type", "param", "code"}
        return status, document["error"]

    def connect(self):
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)

    def post(self, connection, document, path="/v1/completions"):
        """Send a request on a connection, and leave it at that."""
        body = json.dumps(document).encode()
        connection.sendall(head_of(path, len(body)) + body)

    def until(self, holds):
        """Wait until something holds of the engine's status."""
        give_up = time.monotonic() + PATIENCE
        while not holds(self.engine.status()):
            assert time.monotonic() < give_up, self.engine.status()
            time.sleep(0.005)

    def until_idle(self):
        self.until(lambda status: not status.num_running and not status.num_waiting)
        self.engine.check_invariants()
        assert self.engine.status().num_free_pages == self.engine.status().num_pages

    def metric(self, name):
        """The sum of a metric's samples."""
        lines = self.ask("/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


@contextmanager
def running(engine=None, max_waiting=64, limits=None, template="shipped", api_key=None, **service):
    """A server in a thread; at the end it has drained, and left neither thread nor socket."""
    engine = AsyncEngine(engine or new_engine(), max_waiting)
    template = ChatTemplate.load(weights.PRETRAINED) if template == "shipped" else template
    texts = service.pop("tokenizer", parts()[1])
    made = Service(engine, MODEL, texts, template, limits or Limits(), **service)
    server = DrainingServer(made, api_key=api_key, drain_seconds=1)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        give_up = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive() and time.monotonic() < give_up, "the server did not start"
            time.sleep(0.002)
        yield Running(server, engine)
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


def head_of(path, length):
    """The head of a request with a body of so many bytes."""
    kind = "Host: x\r\nContent-Type: application/json"
    return f"POST {path} HTTP/1.1\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def read_all(connection):
    """What comes until the server closes."""
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def slowed(engine, seconds):
    """An engine whose steps take so long at least: requests are still there when a test looks."""
    step = engine.step

    def slow():
        time.sleep(seconds)
        return step()

    engine.step = slow
    return engine
