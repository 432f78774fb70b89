"""Spans of a server's requests: whose children they are, what they tell, and what they cost when nobody listens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from minilib.mechanisms.telemetry import HeadSampler, TailSampler
from minilib.mechanisms.telemetry.spans import Trace
from minilib.operations.tracing.exported import OtlpJsonFile, otlp_document, telemetry_spans
from tests.operations.tracing.observed import ASKED, PARENT, SAMPLED, TRACE, observed
from tests.serving.server.api import MODEL, new_engine, running, slowed

NAMES = ["POST /v1/completions", f"text_completion {MODEL}", "queue", "prefill", "decode"]


def test_a_request_is_a_tree_below_the_clients_span():
    with observed() as (server, spans):
        status, _, body = server.ask("/v1/completions", ASKED | {"user": "ann", "seed": 7}, SAMPLED)
        assert status == 200
        found = {span.name: span for span in spans.finished(5)}
    top, inference, queue, prefill, decode = (found[name] for name in NAMES)
    assert f"{top.context.trace_id:032x}" == TRACE and f"{top.parent.span_id:016x}" == PARENT
    assert (top.kind, inference.kind, top.status.status_code) == (SpanKind.SERVER, SpanKind.INTERNAL, StatusCode.UNSET)
    assert inference.parent.span_id == top.context.span_id
    assert {span.parent.span_id for span in (queue, prefill, decode)} == {inference.context.span_id}
    assert top.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    usage = json.loads(body)["usage"]
    assert inference.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "minilib",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "user.id": "ann",
    }
    assert prefill.attributes == {"minilib.tokens": usage["prompt_tokens"]}
    assert decode.attributes == {"minilib.tokens": 3}
    assert top.start_time <= inference.start_time == queue.start_time <= queue.end_time
    assert queue.end_time == prefill.start_time <= prefill.end_time == decode.start_time <= decode.end_time
    assert decode.end_time <= inference.end_time <= top.end_time


def test_without_a_parent_a_request_is_a_trace_of_its_own():
    with observed() as (server, spans):
        for wrong in ({}, {"traceparent": "nonsense"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}):
            server.ask("/v1/completions", ASKED, wrong)
            found = spans.finished(5)
            assert len({span.context.trace_id for span in found}) == 1 and found[0].parent is None
            trace = Trace(telemetry_spans(found))
            assert trace.root.name == NAMES[0]
            assert sum(segment.duration_ns for segment in trace.critical_path()) == trace.duration_ns


def test_a_client_that_does_not_sample_is_followed():
    with observed() as (server, spans):
        assert server.ask("/v1/completions", ASKED, {"traceparent": f"00-{TRACE}-{PARENT}-00"})[0] == 200
        server.ask("/v1/completions", ASKED, SAMPLED)
        assert {f"{span.context.trace_id:032x}" for span in spans.finished(5)} == {TRACE}
    with observed(sampler=ParentBased(ALWAYS_OFF)) as (server, spans):
        server.ask("/v1/completions", ASKED)
        server.ask("/v1/completions", ASKED, SAMPLED)
        spans.finished(5)


def test_each_prompt_and_a_chat():
    with observed() as (server, spans):
        server.ask("/v1/completions", ASKED | {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1, "stop": "zzz"})
        found = spans.finished(1 + 3 * 4)
        inferences = [span for span in found if span.name == NAMES[1]]
        assert [span.attributes["gen_ai.request.choice.count"] for span in inferences] == [2, 2, 2]
        assert all(span.attributes["gen_ai.response.finish_reasons"] == ("length",) * 2 for span in inferences)
        assert [span.attributes["minilib.tokens"] for span in found if span.name == "decode"] == [6, 6, 6]
        message = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
        server.ask("/v1/chat/completions", message | {"model": MODEL})
        top, chat, *_ = spans.finished(5)
        assert (top.name, chat.name) == ("POST /v1/chat/completions", f"chat {MODEL}")
        assert 0 < chat.attributes["gen_ai.response.time_to_first_chunk"] <= (top.end_time - top.start_time) / 1e9


def test_cached_tokens_are_told():
    with observed(new_engine(prefix_cache="hash")) as (server, spans):
        prompt = [5] * 40
        for cached in (None, 32):
            server.ask("/v1/completions", ASKED | {"prompt": prompt})
            found = {span.name: span for span in spans.finished(5)}
            assert found[NAMES[1]].attributes.get("gen_ai.usage.cache_read.input_tokens") == cached
            assert found["prefill"].attributes["minilib.tokens"] == 40 - (cached or 0)


@pytest.mark.parametrize(
    ("asked", "headers", "path", "status", "error", "name"),
    [
        (ASKED | {"max_tokens": 0}, {}, "/v1/completions", 400, "invalid_value", NAMES[0]),
        (ASKED, {"Authorization": "Bearer no"}, "/v1/completions", 401, "invalid_api_key", NAMES[0]),
        (ASKED, {}, "/v1/nothing", 404, "unknown_path", "POST"),
    ],
)
def test_what_the_client_did_wrong_is_told_and_no_failure(asked, headers, path, status, error, name):
    with observed(api_key="key") as (server, spans):
        headers = {"Authorization": "Bearer key"} | headers
        assert server.refused(path, asked, headers=headers)[0] == status
        (span,) = spans.finished(1)
        assert (span.name, span.attributes["error.type"]) == (name, error)
        assert span.attributes["http.response.status_code"] == status and span.status.status_code is StatusCode.UNSET


def test_a_full_queue():
    with observed(slowed(new_engine(max_sequences=1), 0.01), max_waiting=1) as (server, spans):
        with server.connect() as first, server.connect() as second:
            server.post(first, ASKED | {"max_tokens": 400})
            server.until(lambda status: status.num_running and not status.num_waiting)
            server.post(second, ASKED)
            server.until(lambda status: status.num_waiting)
            assert server.refused("/v1/completions", ASKED)[0] == 429
            top, inference = spans.finished(2)  # it has waited for nothing
            assert top.attributes["error.type"] == inference.attributes["error.type"] == "queue_full"
            assert top.status.status_code is StatusCode.UNSET
        first, *found = spans.finished(1 + 4 + 1 + 2)  # both clients have gone
        gone = [span for span in (first, *found) if span.name == NAMES[0]]
        assert [span.attributes["error.type"] for span in gone] == ["client_gone"] * 2
        assert all(span.status.status_code is StatusCode.UNSET for span in gone)
        waited = [span for span in found if span.name == "queue"]
        assert len(waited) == 2 and all(span.end_time >= span.start_time for span in waited)


def test_an_engine_that_dies_is_a_failure():
    engine = new_engine()
    with observed(engine) as (server, spans):
        step = engine.step

        def broken():
            made = step()
            if any(sequence.num_output_tokens > 2 for sequence in engine.scheduler.running):
                raise SystemExit("the engine breaks")
            return made

        engine.step = broken
        assert server.ask("/v1/completions", ASKED | {"max_tokens": 50})[0] == 503
        found = spans.finished(5)
        assert [span.status.status_code for span in found[:2]] == [StatusCode.ERROR] * 2
        assert found[0].attributes["error.type"] == "engine_died" == found[1].attributes["error.type"]


class CountingObserver:
    """Counts what it is told."""

    calls = 0

    def ended(self, record):
        self.calls += 1
        assert record.ended_ns and record.status == 200


@pytest.mark.parametrize("tokens", [1, 200])
def test_one_call_a_request_however_many_tokens(tokens):
    observer = CountingObserver()
    with running(observer=observer) as server:
        for stream in (False, True):
            server.ask("/v1/completions", ASKED | {"max_tokens": tokens, "stream": stream})
        server.ask("/health")
        server.ask("/metrics")
        server.until_idle()
    assert observer.calls == 2
    with observed() as (server, spans):
        server.ask("/v1/completions", ASKED | {"max_tokens": tokens})
        spans.finished(5)


def test_without_an_observer_no_tracing_is_loaded():
    """The server itself loads neither the SDK nor what makes spans; FastAPI loads OpenTelemetry's API."""
    script = (
        "import sys\n"
        "from tests.serving.server.api import MODEL, running\n"
        "with running() as server:\n"
        "    assert server.ask('/v1/completions', {'model': MODEL, 'prompt': 'a', 'max_tokens': 2})[0] == 200\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'minilib.operations'))])\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert told.stdout == "[]\n"


def test_with_a_global_provider_a_request_still_has_one_server_span():
    """FastAPI makes spans of its own as soon as a global provider is set."""
    script = (
        "from opentelemetry import trace\n"
        "from tests.operations.tracing.observed import ASKED, observed\n"
        "with observed() as (server, spans):\n"
        "    trace.set_tracer_provider(spans.provider)\n"
        "    server.ask('/v1/completions', ASKED)\n"
        "    server.ask('/v1/completions', ASKED)\n"
        "    assert [span.name for span in spans.finished(10)].count('POST /v1/completions') == 2\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr


CHECK = """
import base64, json, sys
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
def as_protobuf(found):
    if isinstance(found, list):
        return [as_protobuf(each) for each in found]
    if not isinstance(found, dict):
        return found
    ids = ("traceId", "spanId", "parentSpanId")
    return {k: base64.b64encode(bytes.fromhex(v)).decode() if k in ids else as_protobuf(v) for k, v in found.items()}
names = []
for line in open(sys.argv[1]):
    data = json_format.ParseDict(as_protobuf(json.loads(line)), TracesData())
    for resource in data.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                assert len(span.trace_id) == 16 and len(span.span_id) == 8 and span.kind in (1, 2, 3)
                names.append([span.name, span.trace_id.hex(), len(span.attributes)])
print(json.dumps(names))
"""


def test_otlps_schema_knows_every_field(tmp_path):
    python = os.environ.get("TRACE_READERS_PYTHON")
    if not python or not Path(python).is_file():
        pytest.skip("TRACE_READERS_PYTHON names no Python that has opentelemetry-proto")
    path = tmp_path / "spans.jsonl"
    with observed() as (server, spans):
        for headers in (SAMPLED, {}):
            server.ask("/v1/completions", ASKED, headers)
            found = spans.finished(5)
            OtlpJsonFile(path).export(found)
    told = subprocess.run([python, "-c", CHECK, path], capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    names = json.loads(told.stdout)
    assert len(names) == 10 and [trace for _, trace, _ in names[:5]] == [TRACE] * 5
    expected = [[span.name, f"{span.context.trace_id:032x}", len(span.attributes)] for span in found]
    assert names[5:] == expected


def test_otlp_json_has_hexadecimal_ids_and_numbers_as_text():
    with observed() as (server, spans):
        server.ask("/v1/completions", ASKED | {"stream": True}, SAMPLED)
        found = spans.finished(5)
    document = json.loads(json.dumps(otlp_document(found)))
    (resource,) = document["resourceSpans"]
    assert {"key": "service.name", "value": {"stringValue": "server"}} in resource["resource"]["attributes"]
    (scope,) = resource["scopeSpans"]
    assert scope["schemaUrl"].startswith("https://opentelemetry.io/schemas/") and scope["scope"] == {"name": "minilib"}
    top, inference, *_ = scope["spans"]
    assert top["traceId"] == TRACE and top["parentSpanId"] == PARENT and top["kind"] == 2
    assert top["flags"] == 0x301 and inference["flags"] == 0x101  # sampled; where the parent is, is known
    values = {each["key"]: each["value"] for each in inference["attributes"]}
    assert values["gen_ai.usage.output_tokens"] == {"intValue": "4"}
    assert values["gen_ai.request.stream"] == {"boolValue": True}
    assert values["gen_ai.request.temperature"] == {"doubleValue": 0.0}
    assert values["gen_ai.response.finish_reasons"] == {"arrayValue": {"values": [{"stringValue": "length"}]}}


def test_a_file_that_cannot_be_written_is_a_failed_export(tmp_path):
    assert OtlpJsonFile(tmp_path / "no" / "folder").export([]) is SpanExportResult.FAILURE


def test_a_tail_sampler_keeps_what_failed_or_was_slow_and_a_share_of_the_rest_by_trace():
    ids = [f"{number:032x}" for number in range(1, 41)]
    kept = [each for each in ids if HeadSampler(0.25).weight(each)]
    with observed(kept_by=TailSampler(slow_ns=3600 * 10**9, rate=0.25)) as (server, spans):
        for each in ids:
            server.ask("/v1/completions", ASKED, {"traceparent": f"00-{each}-{PARENT}-01"})
        found = [span for span in spans.finished(5 * len(kept)) if span.kind is SpanKind.SERVER]
        assert [f"{span.context.trace_id:032x}" for span in found] == kept and 0 < len(kept) < len(ids)
        assert {span.attributes["minilib.sampling.weight"] for span in found} == {4.0}
    with observed(kept_by=TailSampler(slow_ns=0, rate=0)) as (server, spans):
        server.ask("/v1/completions", ASKED, SAMPLED)
        assert spans.finished(5)[0].attributes["minilib.sampling.weight"] == 1.0
    with observed(kept_by=TailSampler(slow_ns=3600 * 10**9, rate=0)) as (server, spans):
        server.ask("/v1/completions", ASKED, SAMPLED)
        server.ask("/v1/completions", ASKED | {"max_tokens": -1}, SAMPLED)  # refused, a client's fault
        assert not spans.exporter.get_finished_spans()
