"""HTTP messages: whole ones at any split, and nothing but a named error for any bytes at all."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilib.classic.http.wire import MAX_BODY, MAX_HEAD, BadMessage, Request, Response, take_request, take_response

GET = b"GET /k?work=1 HTTP/1.1\r\nHost: a\r\n"


def take_all(take, data):
    buffer, messages = bytearray(data), []
    while (message := take(buffer)) is not None:
        messages.append(message)
    return messages, bytes(buffer)


def test_a_message_is_taken_when_it_is_whole_and_not_before():
    request = GET + b"Content-Length: 3\r\nConnection: close\r\n\r\nabc"
    response = Response(200, b"xyz", {"X-Backend": "1"}).encode()
    for take, data in ((take_request, request), (take_response, response)):
        for cut in range(len(data)):
            assert take_all(take, data[:cut]) == ([], data[:cut])
        assert len(take_all(take, data + data)[0]) == 2
        assert take_all(take, data + data[:3])[1] == data[:3]
    assert take_request(bytearray(request)) == Request("GET", "/k?work=1", b"abc", keep_alive=False)
    assert take_response(bytearray(response)) == Response(200, b"xyz", {"x-backend": "1", "content-length": "3"})


@given(st.integers(200, 206), st.binary(max_size=50), st.booleans())
def test_what_is_encoded_is_decoded(status, body, keep_alive):
    taken = take_response(bytearray(Response(status, body, {"A-b": "c d"}).encode(keep_alive)))
    assert (taken.status, taken.body, taken.headers["a-b"], taken.keep_alive) == (status, body, "c d", keep_alive)


PIECES = [
    b"GET",
    b"POST",
    b"get",
    b" ",
    b"/",
    b"*",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"\r\n",
    b"\n",
    b"\r\n\r\n",
    b":",
    b"200",
]
PIECES += [
    b"Host: a",
    b"Content-Length: ",
    b"5",
    b"-1",
    b"99999999",
    b"Transfer-Encoding: chunked",
    b"\0",
    b"\xff",
    b"Z",
]
SOUP = st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=12).map(b"".join)


@given(SOUP)
@example(GET + b": nameless\r\n\r\n")
@example(b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n")
def test_no_bytes_do_worse_than_a_named_error(data):
    for take in (take_request, take_response):
        try:
            messages, rest = take_all(take, data)
        except BadMessage as bad:
            assert bad.status in (400, 413, 431, 501)
        else:
            assert len(rest) <= len(data)
            assert all(message.body in data for message in messages)


BAD_REQUESTS = {
    "no method": (b"/ HTTP/1.1\r\n", 400),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00", 400),
    "lower case": (b"get / HTTP/1.1\r\n", 400),
    "no target": (b"GET HTTP/1.1\r\n", 400),
    "no path": (b"GET http://a/ HTTP/1.1\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n", 400),
    "another version": (b"GET / HTTP/2.0\r\n", 400),
    "bytes beyond ASCII": (b"GET /\xc3\xa4 HTTP/1.1\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "space before the colon": (GET + b"A : b\r\n\r\n", 400),
    "a folded header": (GET + b"A: b\r\n c\r\n\r\n", 400),
    "a bare line feed": (GET + b"A: b\nC: d\r\n\r\n", 400),
    "a zero byte": (GET + b"A: \0\r\n\r\n", 400),
    "a negative length": (GET + b"Content-Length: -1\r\n\r\n", 400),
    "a length in words": (GET + b"Content-Length: ten\r\n\r\n", 400),
    "two lengths": (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "an endless number": (GET + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n", 400),
    "a body too large": (GET + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413),
    "chunks": (GET + b"Transfer-Encoding: chunked\r\n\r\n", 501),
    "an endless first line": (b"G" * (MAX_HEAD + 1), 431),
    "endless headers": (GET + b"A: b\r\n" * 2000, 431),
    "headers too long, and whole": (GET + b"A: " + b"b" * MAX_HEAD + b"\r\n\r\n", 431),
}


@pytest.mark.parametrize("data, status", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name(data, status):
    with pytest.raises(BadMessage) as refused:
        take_request(bytearray(data))
    assert refused.value.status == status


@pytest.mark.parametrize(
    "start", [b"HTTP/2 200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 999 No", b"hello", b"GET / HTTP/1.1"]
)
def test_a_bad_answer_is_refused(start):
    with pytest.raises(BadMessage):
        take_response(bytearray(start + b"\r\nContent-Length: 0\r\n\r\n"))
    with pytest.raises(BadMessage, match="Content-Length is one number, got None"):
        take_response(bytearray(b"HTTP/1.1 200 OK\r\n\r\n"))


@pytest.mark.parametrize(
    "version, connection, keep_alive",
    [
        ("1.1", "", True),
        ("1.1", "Close", False),
        ("1.0", "", False),
        ("1.0", "Keep-Alive", True),
        ("1.1", "x, close", False),
    ],
)
def test_who_keeps_a_connection(version, connection, keep_alive):
    data = f"GET / HTTP/{version}\r\nHost: a\r\nConnection: {connection}\r\n\r\n".encode()
    assert take_request(bytearray(data)).keep_alive == keep_alive
