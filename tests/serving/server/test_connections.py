"""What other clients than OpenAI's send: older HTTP, offers to upgrade, HEAD, heads without end, what is no HTTP."""

import json

import pytest

from minilib.serving.server.limits import Limits
from tests.serving.server.api import MODEL, head_of, read_all, running

TEXT = {"model": MODEL, "prompt": "a", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
STREAM = json.dumps(TEXT | {"stream": True}).encode()
PATH = "/v1/completions"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


def exchange(server, *parts):
    """All that comes for some bytes, sent in parts, until the server closes."""
    with server.connect() as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


def closing(head):
    return head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


def test_http_1_0_gets_no_chunks(server):
    """nginx asks its backends by HTTP/1.0, unless told otherwise, and passes chunks of such an answer on as text."""
    head = head_of(PATH, len(STREAM)).replace(b"HTTP/1.1", b"HTTP/1.0")
    answer, _, body = exchange(server, head + STREAM).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and b"transfer-encoding" not in answer
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
    assert all(line.startswith(b"data: ") for line in body.split(b"\n\n")[:-1])
    whole = json.dumps(TEXT).encode()
    head = head_of(PATH, len(whole)).replace(b"HTTP/1.1", b"HTTP/1.0")
    answer, _, body = exchange(server, head + whole).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in answer and json.loads(body)["choices"]


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET])
@pytest.mark.parametrize("whole", [True, False])
def test_an_offer_to_upgrade_is_not_taken(server, offer, whole):
    """Java's client offers h2c with each request; the parser takes what follows for the other protocol."""
    body = json.dumps(TEXT).encode()
    request = head_of(PATH, len(body)).replace(b"\r\n", b"\r\n" + offer, 1) + body
    last = closing(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    parts = [request, last] if whole else [request[:-5], request[-5:] + last]
    answer = exchange(server, *parts)
    assert answer.count(b"HTTP/1.1 200") == 2 and b'"finish_reason": "length"' in answer


def test_head_is_get_without_its_body(server):
    for path in ("/health", "/ready", "/v1/models", "/metrics"):
        length = len(server.ask(path)[2])
        answer = exchange(server, closing(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
        assert path == "/metrics" or f"content-length: {length}\r\n".encode() in answer
    assert b" 405 " in exchange(server, closing(b"HEAD /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n"))


@pytest.mark.parametrize("in_one", [True, False])
def test_heads_are_bounded(in_one):
    with running(limits=Limits(header_bytes=1000)) as server:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
        assert b" 200 " in exchange(server, closing(head + b"A: " + b"a" * 800 + b"\r\n\r\n"))
        for more in (b"A: " + b"a" * 1000, b"A: b\r\n" * 500):
            parts = [head + more + b"\r\n\r\n"] if in_one else [head, more[:600], more[600:]]
            answer = exchange(server, *parts)
            assert b" 431 " in answer and b"head_too_large" in answer


def test_what_is_no_http_never_lands_in_a_response(server):
    """Behind a request that is being answered come bytes that are none: the answer ends as it must, then the
    connection."""
    for count in (1, 3):
        answer = exchange(server, count * (head_of(PATH, len(STREAM)) + STREAM) + b"\0\r\n\r\n")
        assert b" 400 " not in answer and answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200") == count
    cut = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 400 " in exchange(server, cut + b"no chunk\r\n")
    server.until_idle()
