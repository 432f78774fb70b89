"""HTTP messages: complete ones at any split, and nothing but a named error for any bytes at all."""

import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilib.classic.http.wire import (
    MAX_BODY,
    MAX_HEAD,
    HttpError,
    Request,
    Response,
    SharedTimeout,
    encode_request,
    read_request,
    read_response,
)

GET = b"GET /k?work=1 HTTP/1.1\r\nHost: a\r\n"


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
    request = GET + b"Content-Length: 0\r\nConnection: close\r\n\r\n"
    expected = {
        read_request: (
            request,
            Request("/k?work=1", False, {"host": "a", "content-length": "0", "connection": "close"}),
        ),
        read_response: (Response(200, b"xyz", "text/x").encode(), Response(200, b"xyz", "text/x")),
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
            refusal = HttpError if cut and function is read_request else ConnectionError
            with pytest.raises(
                refusal, match="closed the connection before its re" if cut else "closed the connection"
            ):
                await function(reader_of(data[:cut]))

    for function, (data, message) in expected.items():
        asyncio.run(check(function, data, message))


async def turns():
    """Let the event loop do all that is due."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_shared_timeout_ends_what_is_late_and_nothing_else():
    async def check():
        loop, now, timers = asyncio.get_running_loop(), [0.0], []
        call_at, loop.time = loop.call_at, lambda: now[0]
        loop.call_at = lambda *given, **more: timers.append(given[0]) or call_at(*given, **more)
        shared, done = SharedTimeout(5), asyncio.Event()
        late = asyncio.create_task(shared.wait_for(asyncio.Event().wait()))
        for number in range(100):
            assert await shared.wait_for(asyncio.sleep(0, number)) == number
        with pytest.raises(ZeroDivisionError):
            await shared.wait_for(asyncio.to_thread(divmod, 1, 0))
        now[0] = 3.0
        in_time = asyncio.create_task(shared.wait_for(done.wait()))
        await turns()
        assert timers == [5.0] and not late.done(), "one timer for all"
        now[0] = 5.0
        await turns()
        assert timers == [5.0, 8.0] and late.done() and not in_time.done()
        with pytest.raises(TimeoutError, match="not done within 5 s"):
            await late
        assert late.cancelling() == 0
        done.set()
        assert await in_time
        now[0] = 8.0
        await turns()
        assert timers == [5.0, 8.0] and shared._timer is None, "nobody waits any more"

    asyncio.run(check())


@pytest.mark.parametrize("is_late", [False, True])
def test_who_is_cancelled_by_another_is_not_late(is_late):
    async def check():
        loop, now = asyncio.get_running_loop(), [0.0]
        loop.time = lambda: now[0]
        shared = SharedTimeout(5)
        task = asyncio.create_task(shared.wait_for(asyncio.Event().wait()))
        await turns()
        now[0] = 6.0 * is_late
        shared._expire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(check())


@given(st.integers(200, 206), st.binary(max_size=50), st.booleans())
def test_what_is_encoded_is_decoded(status, body, keep_alive):
    message = Response(status, body, "c/d; e=f", keep_alive)
    assert read(read_response, message.encode(keep_alive)) == message


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
            while message := await function(reader):
                assert function is read_request or message.body in data
        except HttpError as bad:
            assert bad.status in (400, 413, 431, 501)
        except ConnectionError as ended:
            assert "closed the connection" in str(ended)

    for function in (read_request, read_response):
        asyncio.run(check(function))


FIRST_LINE = HEADER = "needs a first line of HTTP/1.1, then headers of a name, a colon"
LENGTH = "is one number, got"
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
    "an old version": (b"GET / HTTP/1.0\r\n" + END, 400, FIRST_LINE),
    "another method": (b"POST / HTTP/1.1\r\n" + END, 501, "only GET is answered, got POST"),
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
    "a body": (GET + b"Content-Length: 1\r\n\r\nx", 413, "a GET has no body, got one of 1 bytes"),
    "chunks": (GET + b"Transfer-Encoding: chunked\r\n\r\n", 501, "needs a Content-Length"),
    "an endless first line": (b"G" * (MAX_HEAD + 5), 431, "take more than 8192 bytes"),
    "endless headers": (GET + b"A: b\r\n" * 2000, 431, "take more than 8192 bytes"),
    "headers too long, and complete": (GET + b"A: " + b"b" * MAX_HEAD + b"\r\n\r\n", 431, "take more than 8192 bytes"),
}


@pytest.mark.parametrize("data, status, reason", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name(data, status, reason):
    with pytest.raises(HttpError, match=reason) as refused:
        read(read_request, data)
    assert refused.value.status == status


def test_headers_and_bodies_up_to_the_limits_are_read():
    longest = GET + b"A: " + b"b" * (MAX_HEAD - len(GET) - 3) + b"\r\n\r\n"
    value = "b" * (MAX_HEAD - len(GET) - 3)
    assert read(read_request, longest) == ("/k?work=1", True, {"host": "a", "a": value})
    body = b"x" * MAX_BODY
    assert read(read_response, Response(200, body).encode()).body == body


@pytest.mark.parametrize(
    "start", [b"HTTP/2 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 999 No", b"hello", b"GET / HTTP/1.1"]
)
def test_a_bad_response_is_refused(start):
    with pytest.raises(HttpError, match=FIRST_LINE):
        read(read_response, start + b"\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(HttpError, match="Content-Length is one number, got none"):
        read(read_response, b"HTTP/1.1 200 OK\r\n\r\n")


@pytest.mark.parametrize(
    "connection, keep_alive",
    [("", True), ("Keep-Alive", True), ("Close", False), ("x, close", False), ("closed", True)],
)
def test_who_keeps_a_connection(connection, keep_alive):
    assert read(read_request, GET + f"Connection: {connection}\r\n\r\n".encode()).keep_alive == keep_alive


def test_headers_that_are_sent_are_received_and_none_of_them_ends_its_line():
    sent = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "x-empty": ""}
    request = read(read_request, encode_request("/k", sent))
    assert request == ("/k", True, {"host": "127.0.0.1", **sent})
    for bad in ({"x": "1\r\nContent-Length: 5"}, {"x\r\ny": "1"}, {"": "1"}, {"x y": "1"}, {"x": "\0"}):
        with pytest.raises(ValueError, match="on one line"):
            encode_request("/k", bad)
