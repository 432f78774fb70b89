"""Hostile requests, many of them: none is a 500, none leaves a page behind, and memory stays what it was.

MINILIB_FUZZ=10000 pytest tests/serving/server/test_fuzz.py
"""

import gc
import http.client
import json
import os
import random
from collections import Counter
from copy import deepcopy

import psutil

from minilib.serving.server.limits import Limits
from tests.serving.server.api import MODEL, PATIENCE, head_of, new_engine, running

REQUESTS = int(os.environ.get("MINILIB_FUZZ", 400))
GROWTH = 24 * 2**20  # bytes that the process may grow by after the first third
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
BODIES = [b"", b"[" * 2000, b'{"a":' * 2000, b"NaN", b"\xff\xfe", b'"\\ud800"', b"1e999", b"{}", b"[]"]
ATOMS = [None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 0.5, 1e308, "", "a", "\0", "ü😀", "<|end|>", "x" * 3000]
ATOMS += [[], {}, [[]], [None], {"a": 1}, [1, "a"], ["a"] * 70, [5] * 1500, [[5], [6]], [-1], [2**40], "1", "\ufdd0"]
FIELDS = (
    "model prompt messages n max_tokens temperature top_p top_k stop stream stream_options seed logprobs echo user "
)
FIELDS += "top_logprobs priority cache_salt stop_token_ids ignore_eos tools logit_bias tokens role content"


def good(path, rng):
    """A request that is served."""
    body = {"model": MODEL, "max_tokens": rng.randrange(1, 5), "temperature": rng.choice([0, 0.7, 2])}
    body |= {"n": rng.randrange(1, 4), "stream": rng.random() < 0.3}
    match path:
        case "/v1/completions":
            return body | {"prompt": rng.choice(["def f(", [5, 6, 7], ["a", "b"], [[1], [2, 3]]]), "logprobs": 1}
        case "/v1/chat/completions":
            content = rng.choice(["hi", "<|end|>", [{"type": "text", "text": "a"}]])
            return body | {"messages": [{"role": rng.choice(["user", "system", "tool"]), "content": content}]}
        case "/tokenize":
            return {"prompt": "x" * rng.randrange(50)}
    return {"tokens": [rng.randrange(2048) for _ in range(9)]}


def spoilt(document, rng):
    """A document with something changed in it, at any depth."""
    place = document
    while rng.random() < 0.4:
        inner = [
            each for each in (place.values() if isinstance(place, dict) else place) if isinstance(each, dict | list)
        ]
        if not inner:
            break
        place = rng.choice(inner)
    if isinstance(place, dict):
        place[rng.choice([*FIELDS.split(), *place])] = deepcopy(rng.choice(ATOMS))
        if rng.random() < 0.2:
            place.pop(rng.choice(list(place)))
    else:
        place.insert(rng.randrange(len(place) + 1), deepcopy(rng.choice(ATOMS)))
    return document


def body_of(path, rng):
    document = good(path, rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        document = spoilt(document, rng)
    body = bytearray(json.dumps(document).encode())
    match rng.randrange(8):
        case 0:
            for _ in range(rng.randrange(1, 6)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        case 1:
            del body[rng.randrange(len(body)) :]
        case 2:
            body = bytearray(
                rng.choice([b"", b"[" * 2000, b'{"a":' * 2000, b"NaN", b"\xff\xfe", b'"\\ud800"', b"1e999"])
            )
    return bytes(body)


def leave(server, path, body, rng):
    """Send some of a request, or all of it, and go away."""
    with server.connect() as connection:
        whole = head_of(path, len(body)) + body
        connection.sendall(whole[: rng.randrange(1, len(whole) + 1)])


def test_hostile_requests():
    rng, statuses, process, start = random.Random(17), Counter(), psutil.Process(), None
    limits = Limits(body_bytes=100_000)
    with running(new_engine(prefix_cache="hash"), limits=limits, max_model_len=100) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
        for number in range(REQUESTS):
            path = rng.choice(PATHS)
            body = body_of(path, rng)
            if rng.random() < 0.1:
                leave(server, path, body, rng)
                continue
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            statuses[response.status] += 1
            assert response.status in (200, 400, 404, 413), (response.status, path, body, text)
            if response.status != 200:
                assert json.loads(text)["error"]["message"], (path, body)
            else:
                assert b'{"error": {"message"' not in text, (path, body, text)
            if number == REQUESTS // 3:
                gc.collect()
                start = process.memory_info().rss
        connection.close()
        server.until_idle()
        gc.collect()
        grown = process.memory_info().rss - start
        assert grown < GROWTH, f"{grown / 2**20:.1f} MiB more than after a third"
        assert server.metric("minilib_http_requests_total") >= sum(statuses.values())
    assert statuses[200] > REQUESTS // 20 and statuses[400] > REQUESTS // 4, statuses
