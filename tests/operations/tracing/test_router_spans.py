"""Spans of a router: one for a request, one for each time it is sent, and those of the replica below it."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
from opentelemetry.trace import SpanKind, StatusCode

from minilib.mechanisms.balancing import RoundRobin
from minilib.operations.tracing.router_spans import TracedRouter
from minilib.serving.router.discovery import in_list
from tests.operations.tracing.observed import ASKED, PARENT, SAMPLED, TRACE, Spans, observed
from tests.serving.router.fake_replica import FakeReplica


@asynccontextmanager
async def before(*urls, spans):
    """A traced router before replicas, and a client of it."""
    async with AsyncExitStack() as stack:
        router = TracedRouter(in_list(urls), spans.provider, policy=RoundRobin(), every=30.0)
        await router.start()
        stack.push_async_callback(router.stop)
        url = f"http://127.0.0.1:{router.gateway.port}"
        yield await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30.0, trust_env=False))


def run(drill):
    return asyncio.run(asyncio.wait_for(drill, 60))


def id_of(span):
    return f"{span.context.span_id:016x}"


def test_a_trace_goes_from_the_client_through_the_router_to_the_engine():
    spans = Spans("router")
    with observed() as (server, of_server):

        async def drill():
            async with before(server.url, spans=spans) as client:
                answer = await client.post("/v1/completions", json=ASKED, headers=SAMPLED | {"tracestate": "a=b"})
                assert answer.status_code == 200
                await client.get("/health")

        run(drill())
        top, attempt = spans.finished(2)
        check, request, *_ = of_server.finished(1 + 5)  # the router asks each replica for its model first
    assert check.name == "GET /v1/models" and check.parent is None
    assert (top.kind, attempt.kind, request.kind) == (SpanKind.SERVER, SpanKind.CLIENT, SpanKind.SERVER)
    assert {f"{span.context.trace_id:032x}" for span in (top, attempt, request)} == {TRACE}
    parents = [f"{span.parent.span_id:016x}" for span in (top, attempt, request)]
    assert parents == [PARENT, id_of(top), id_of(attempt)]
    assert request.context.trace_state.to_header() == "a=b"
    assert top.attributes["http.response.status_code"] == attempt.attributes["http.response.status_code"] == 200
    assert attempt.attributes["server.port"] == server.port and "error.type" not in attempt.attributes


def test_a_request_that_is_sent_twice_has_two_spans_in_one():
    spans = Spans("router")

    async def drill():
        replicas = FakeReplica("full"), FakeReplica("good")
        for replica in replicas:
            await replica.start()
        replicas[0].full = True
        async with before(*[replica.url for replica in replicas], spans=spans) as client:
            assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})).status_code == 200
        for replica in replicas:
            await replica.kill()

    run(drill())
    top, refused, again = spans.finished(3)
    assert refused.attributes["error.type"] == "refused" and refused.attributes["http.response.status_code"] == 429
    assert again.attributes["http.request.resend_count"] == 1 and "http.request.resend_count" not in refused.attributes
    assert {span.parent.span_id for span in (refused, again)} == {top.context.span_id}
    assert {span.context.trace_id for span in (refused, again)} == {top.context.trace_id}
    assert top.attributes["http.response.status_code"] == again.attributes["http.response.status_code"] == 200
    assert {span.status.status_code for span in (top, again)} == {StatusCode.UNSET}


def test_no_replica_is_a_failure_of_the_router():
    spans = Spans("router")

    async def drill():
        async with before(spans=spans) as client:
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 503

    run(drill())
    (top,) = spans.finished(1)
    assert top.attributes["http.response.status_code"] == 503 and top.attributes["error.type"] == "503"
    assert top.status.status_code is StatusCode.ERROR
