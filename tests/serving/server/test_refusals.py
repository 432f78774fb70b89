"""Every refusal is OpenAI's body with the right status, and leaves the server as it was."""

import gzip
import json
import socket
from contextlib import suppress

import pytest

from minilib.serving.server.limits import Limits
from tests.serving.server.api import MODEL, head_of, parts, read_all, running

TEXT = {"model": MODEL, "prompt": "a", "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

WRONG = [
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"n": "1"}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1024}, None, "context_length_exceeded"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"stop": list("abcde")}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": "x" * 1025}, "stop", "invalid_value"),
    ({"stop_token_ids": [2048]}, None, "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown_field"),
    ({"unknown": None}, "unknown", "unknown_field"),
    ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter"),
    ({"presence_penalty": -1}, "presence_penalty", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"priority": -1}, "priority", "invalid_value"),
]
WRONG_TEXT = [
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
    ({"prompt": [1, True]}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
    ({"prompt": [2048]}, None, "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 65}, "prompt", "too_many"),
    ({"prompt": ["a"] * 20, "n": 10}, "n", "too_many"),
    ({"prompt": [1] * 1024}, "prompt", "context_length_exceeded"),
    ({"prompt": "x " * 2000}, "prompt", "context_length_exceeded"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"suffix": "b"}, "suffix", "unsupported_parameter"),
    ({"logprobs": 6}, "logprobs", "invalid_value"),
    ({"logprobs": 1, "echo": True}, "echo", "unsupported_parameter"),
]
WRONG_CHAT = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "invalid_value"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages", "unknown_field"),
    ({"messages": [{"role": "user", "content": ""}], "max_tokens": 1024}, "messages", "context_length_exceeded"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"max_completion_tokens": 2}, "max_tokens", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ({"prompt": "a"}, "prompt", "unknown_field"),
]


@pytest.mark.parametrize("path, good", [(COMPLETIONS, TEXT), (CHATS, CHAT)])
@pytest.mark.parametrize("change, param, code", WRONG)
def test_values_that_make_no_sense(server, path, good, change, param, code):
    assert server.ask(path, good)[0] == 200
    status, error = server.refused(path, good | change)
    assert (status, error["code"], error["type"]) == (400, code, "invalid_request_error")
    assert error["param"] == param or param is None
    assert param is None or param in error["message"] or code == "context_length_exceeded"


@pytest.mark.parametrize("change, param, code", WRONG_TEXT)
def test_completions_that_make_no_sense(server, change, param, code):
    status, error = server.refused(COMPLETIONS, TEXT | change)
    assert (status, error["code"]) == (400, code)
    assert error["param"] == param or param is None


@pytest.mark.parametrize("change, param, code", WRONG_CHAT)
def test_chats_that_make_no_sense(server, change, param, code):
    status, error = server.refused(CHATS, CHAT | change)
    assert (status, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_missing_fields(server, missing):
    status, error = server.refused(COMPLETIONS, {key: value for key, value in TEXT.items() if key != missing})
    assert (status, error["code"], error["param"]) == (400, "missing_field", missing)


NO_REQUEST = [b"", b"{", b"null", b"[]", b'"a"', b"{} {}", b"\x00", b"\xff", b'{"model": "\xff"}', b'{"model": NaN}']
NO_REQUEST += [b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"n": ' + b"9" * 10_000 + b"}"]
NO_REQUEST += [json.dumps(TEXT).encode()[:-1]]


@pytest.mark.parametrize("body", NO_REQUEST)
def test_bodies_that_are_no_request(server, body):
    status, error = server.refused(COMPLETIONS, body)
    assert status == 400 and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_other_media_types(server, kind):
    status, error = server.refused(COMPLETIONS, TEXT, headers={"Content-Type": kind})
    assert (status, error["code"]) == (415, "unsupported_media_type")
    assert server.ask(COMPLETIONS, TEXT, {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def test_paths_and_methods(server):
    assert server.refused("/v1/nothing")[0] == 404
    assert server.refused("/v1/models/other")[1]["code"] == "model_not_found"
    status, error = server.refused(COMPLETIONS, method="GET")
    assert (status, error["code"]) == (405, "method_not_allowed")
    status, headers, _ = server.ask(COMPLETIONS, method="DELETE")
    assert (status, headers["Allow"]) == (405, "POST")
    assert server.refused("/docs")[0] == 404


def test_bodies_that_are_too_large():
    with running(limits=Limits(body_bytes=2000)) as server:
        assert server.ask(COMPLETIONS, TEXT)[0] == 200
        assert server.refused(COMPLETIONS, TEXT | {"user": "x" * 2000})[:1] == (413,)
        lengths = (b"Content-Length: 99999999999999999999999", b"Content-Length: 3000")
        for head in (*lengths, b"Transfer-Encoding: chunked"):
            with server.connect() as connection:
                start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                connection.sendall(start + head + b"\r\n\r\n")
                if b"chunked" in head:
                    connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n" + b"7d0\r\n" + b"x" * 2000)
                answer = read_all(connection)
                assert b" 413 " in answer or (b"9999" in head and b" 400 " in answer), answer
                assert b'"error"' in answer


def test_bodies_and_headers_that_do_not_come():
    with running(limits=Limits(body_seconds=0.2, header_seconds=0.2)) as server:
        with server.connect() as connection:
            server.post(connection, TEXT)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with server.connect() as connection:
            connection.sendall(head_of(COMPLETIONS, 9) + b"{")
            answer = read_all(connection)
            assert b" 408 " in answer and b"body_timeout" in answer
        for begun in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nA: b\r\n"):
            with server.connect() as connection:
                connection.sendall(begun)
                with suppress(ConnectionResetError):
                    assert read_all(connection) == b""


def test_no_http(server):
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = read_all(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 400 " in head and json.loads(body)["error"]["code"] == "invalid_http"


def test_a_body_that_is_cut_short_costs_nothing(server):
    before = server.metric("minilib_generation_tokens_total")
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(head_of(COMPLETIONS, 999) + b"{")
            connection.shutdown(socket.SHUT_WR)
            assert b" 200 " not in read_all(connection)
    server.until_idle()
    assert server.metric("minilib_generation_tokens_total") == before


def test_keys():
    with running(api_key="right ü") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": ""}):
            for path in (COMPLETIONS, "/v1/nothing", "/tokenize"):
                status, error = server.refused(path, TEXT, headers=headers)
                assert (status, error["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer " + "right ü".encode().decode("latin-1")}
        assert server.ask(COMPLETIONS, TEXT, right)[0] == 200
        for path in ("/health", "/ready", "/metrics"):
            assert server.ask(path)[0] == 200


def test_models_without_tokenizer_or_template():
    with running(tokenizer=None, template=None) as server:
        assert server.refused(COMPLETIONS, TEXT)[1]["code"] == "no_tokenizer"
        assert server.refused(CHATS, CHAT)[1]["code"] == "no_chat_template"
        answer = json.loads(server.ask(COMPLETIONS, TEXT | {"prompt": [5, 6], "logprobs": 1})[2])
        assert answer["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")


def test_a_shorter_context():
    with running(max_model_len=20) as server:
        assert json.loads(server.ask("/v1/models")[2])["data"][0]["max_model_len"] == 20
        assert server.refused(COMPLETIONS, TEXT | {"prompt": [5] * 20})[1]["code"] == "context_length_exceeded"
        answer = json.loads(server.ask(COMPLETIONS, {"model": MODEL, "prompt": [5] * 15, "ignore_eos": True})[2])
        assert answer["usage"]["total_tokens"] == 20


def test_tokens_there_and_back(server):
    ids = parts()[1].encode("def f(x):").ids
    told = json.loads(server.ask("/tokenize", {"prompt": "def f(x):"})[2])
    assert told == {"count": len(ids), "max_model_len": 1024, "tokens": ids}
    assert json.loads(server.ask("/detokenize", {"tokens": ids})[2]) == {"prompt": "def f(x):"}
    chat = json.loads(server.ask("/tokenize", {"messages": CHAT["messages"]})[2])
    assert chat["tokens"] == parts()[1].encode("a\n").ids
    assert server.refused("/tokenize", {"text": "a"})[1]["param"] == "prompt"
    assert server.refused("/tokenize", {"messages": [{}]})[1]["message"].startswith("messages[0].role")
    assert server.refused("/tokenize", b"[]")[0] == server.refused("/tokenize", b"{")[0] == 400
    assert server.refused("/detokenize", {"tokens": [2048]})[1]["param"] == "tokens"


def test_a_message_that_makes_no_sense_is_found(server):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    told = server.refused(CHATS, CHAT | {"messages": messages})[1]["message"]
    assert told.startswith("messages[1].content: ")


def test_what_is_not_there_says_what_is(server):
    assert "this path takes POST" in server.refused(COMPLETIONS, method="PUT")[1]["message"]
    assert "/openapi.json" in server.refused("/v1/embeddings", {})[1]["message"]


def test_compressed_bodies(server):
    status, error = server.refused(
        COMPLETIONS, gzip.compress(json.dumps(TEXT).encode()), headers={"Content-Encoding": "gzip"}
    )
    assert (status, error["code"]) == (415, "unsupported_content_encoding")
