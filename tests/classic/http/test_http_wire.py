"""HTTP messages: complete ones at any split, and nothing but a named error for any bytes at all."""

import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilib.classic.http.wire import MAX_BODY, MAX_HEAD, BadMessage, Request, Response, read_request, read_response

GET = b"GET /k?work=1 HTTP/1.1\r\nHost: a\r\n"


def request_of(reader):
    return read_request(reader, timeout=5)


def reader_of(data, eof=True):
    reader = asyncio.StreamReader(limit=MAX_HEAD)
    reader.feed_data(data)
    if eof:
        reader.feed_eof()
    return reader


def read(function, data):
    """The first message in data, after which the connection ends."""

    async def first():
        return await function(reader_of(data))

    return asyncio.run(first())


def test_a_message_is_read_when_it_is_complete_and_not_before():
    request = GET + b"Content-Length: 3\r\nConnection: close\r\n\r\nabc"
    response = Response(200, b"xyz", {"X-Backend": "1"}).encode()
    expected = {
        request_of: (request, Request("GET", "/k?work=1", b"abc", keep_alive=False)),
        read_response: (response, Response(200, b"xyz", {"x-backend": "1", "content-length": "3"})),
    }

    async def check(function, data, message):
        for cut in range(len(data)):
            reader = reader_of(data[:cut], eof=False)
            reading = asyncio.create_task(function(reader))
            for _ in range(3):
                await asyncio.sleep(0)
            assert not reading.done()
            reader.feed_data(data[cut:] + data)
            assert await reading == message == await function(reader), "and nothing of the next one is taken"
            if cut or function is read_response:
                with pytest.raises((BadMessage, ConnectionError), match="closed the connection before its message"):
                    await function(reader_of(data[:cut]))
            else:
                assert await function(reader_of(b"")) is None

    for function, (data, message) in expected.items():
        asyncio.run(check(function, data, message))


def test_a_request_that_is_late_is_refused_and_one_that_never_began_is_not():
    async def check():
        assert await read_request(reader_of(b"", eof=False), timeout=0.01) is None
        with pytest.raises(BadMessage, match="complete within 0.01 s") as refused:
            await read_request(reader_of(GET, eof=False), timeout=0.01)
        assert refused.value.status == 408

    asyncio.run(check())


@given(st.integers(200, 206), st.binary(max_size=50), st.booleans())
def test_what_is_encoded_is_decoded(status, body, keep_alive):
    message = read(read_response, Response(status, body, {"A-b": "c d"}).encode(keep_alive))
    assert (message.status, message.body, message.headers["a-b"], message.keep_alive) == (
        status,
        body,
        "c d",
        keep_alive,
    )


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
    async def check(function):
        reader = reader_of(data)
        try:
            while (message := await function(reader)) is not None:
                assert message.body in data
        except BadMessage as bad:
            assert bad.status in (400, 413, 431, 501)
        except ConnectionError:
            assert function is read_response

    for function in (request_of, read_response):
        asyncio.run(check(function))


FIRST_LINE, HEADER, LENGTH = "the first line is none of HTTP/1.1", "a header is a name, a colon", "is one number, got"
END = b"Host: a\r\n\r\n"
BAD_REQUESTS = {
    "no method": (b"/ HTTP/1.1\r\n" + END, 400, FIRST_LINE),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00", 400, "closed the connection before"),
    "not HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, FIRST_LINE),
    "lower case": (b"get / HTTP/1.1\r\n" + END, 400, FIRST_LINE),
    "no target": (b"GET HTTP/1.1\r\n" + END, 400, FIRST_LINE),
    "no path": (b"GET http://a/ HTTP/1.1\r\n" + END, 400, FIRST_LINE),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + END, 400, FIRST_LINE),
    "another version": (b"GET / HTTP/2.0\r\n" + END, 400, FIRST_LINE),
    "bytes beyond ASCII": (b"GET /\xc3\xa4 HTTP/1.1\r\n" + END, 400, FIRST_LINE),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400, "names a Host"),
    "space before the colon": (GET + b"A : b\r\n\r\n", 400, HEADER),
    "a folded header": (GET + b"A: b\r\n c\r\n\r\n", 400, HEADER),
    "a bare line feed": (GET + b"A: b\nC: d\r\n\r\n", 400, HEADER),
    "a zero byte": (GET + b"A: \0\r\n\r\n", 400, HEADER),
    "a negative length": (GET + b"Content-Length: -1\r\n\r\n", 400, LENGTH),
    "a length in words": (GET + b"Content-Length: ten\r\n\r\n", 400, LENGTH),
    "two lengths": (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, LENGTH),
    "an endless number": (GET + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n", 400, LENGTH),
    "a body too large": (GET + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413, "at most 65536 bytes, got 65537"),
    "chunks": (GET + b"Transfer-Encoding: chunked\r\n\r\n", 501, "needs a Content-Length"),
    "an endless first line": (b"G" * (MAX_HEAD + 5), 431, "take more than 8192 bytes"),
    "endless headers": (GET + b"A: b\r\n" * 2000, 431, "take more than 8192 bytes"),
    "headers too long, and complete": (GET + b"A: " + b"b" * MAX_HEAD + b"\r\n\r\n", 431, "take more than 8192 bytes"),
}


@pytest.mark.parametrize("data, status, reason", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name(data, status, reason):
    with pytest.raises(BadMessage, match=reason) as refused:
        read(request_of, data)
    assert refused.value.status == status


def test_headers_and_bodies_up_to_the_limits_are_read():
    longest = GET + b"A: " + b"b" * (MAX_HEAD - len(GET) - 3) + b"\r\n\r\n"
    assert read(request_of, longest).target == "/k?work=1"
    body = b"x" * MAX_BODY
    assert read(request_of, GET + b"Content-Length: %d\r\n\r\n" % MAX_BODY + body).body == body


@pytest.mark.parametrize(
    "start", [b"HTTP/2 200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 999 No", b"hello", b"GET / HTTP/1.1"]
)
def test_a_bad_response_is_refused(start):
    with pytest.raises(BadMessage, match=FIRST_LINE):
        read(read_response, start + b"\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(BadMessage, match="Content-Length is one number, got None"):
        read(read_response, b"HTTP/1.1 200 OK\r\n\r\n")


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
    assert read(request_of, data).keep_alive == keep_alive
