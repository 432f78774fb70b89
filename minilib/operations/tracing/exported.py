"""Spans of OpenTelemetry on their way out: as OTLP's JSON in a file, and as the spans that this library computes with.

A line of the file is a `TracesData` in JSON, as OpenTelemetry's collector reads and writes it. OTLP's JSON is not
protobuf's: ids are hexadecimal digits, not base64, and enumerations are numbers.

Source: OpenTelemetry Protocol 1.x, "JSON Protobuf encoding"; "File exporter".
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from minilib.mechanisms.telemetry.spans import Span

_REMOTE_KNOWN, _REMOTE = 1 << 8, 1 << 9  # flags of a span: whether it is known that the parent is elsewhere, and that


class OtlpJsonFile(SpanExporter):
    """Appends spans to a file, a line for each call.

    Args:
        path: of the file, which is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append a line."""
        line = json.dumps(otlp_document(spans)) + "\n"
        try:
            with self._lock, self._path.open("a") as file:
                file.write(line)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def otlp_document(spans: Iterable[ReadableSpan]) -> dict[str, Any]:
    """Spans as OTLP's `TracesData`, by their resource and their tracer."""
    by_source: dict[Any, dict[Any, list[ReadableSpan]]] = {}
    for span in spans:
        by_source.setdefault(span.resource, {}).setdefault(span.instrumentation_scope, []).append(span)
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource.attributes)},
                "scopeSpans": [
                    {
                        "scope": {"name": scope.name} | ({"version": scope.version} if scope.version else {}),
                        "schemaUrl": scope.schema_url or "",
                        "spans": [_span(span) for span in of_scope],
                    }
                    for scope, of_scope in by_scope.items()
                ],
            }
            for resource, by_scope in by_source.items()
        ]
    }


def telemetry_spans(spans: Iterable[ReadableSpan]) -> list[Span]:
    """The same spans as `telemetry.Span`, whose parents in other processes are left out."""
    spans = list(spans)
    known = {span.context.span_id for span in spans}
    return [
        Span(
            span.name,
            f"{span.context.trace_id:032x}",
            f"{span.context.span_id:016x}",
            f"{span.parent.span_id:016x}" if span.parent and span.parent.span_id in known else None,
            str(span.resource.attributes.get("service.instance.id", span.resource.attributes.get("service.name", ""))),
            span.start_time,
            span.end_time,
            dict(span.attributes or {}),
        )
        for span in spans
    ]


def _span(span: ReadableSpan) -> dict[str, Any]:
    is_remote = bool(span.parent and span.parent.is_remote)
    found = {
        "traceId": f"{span.context.trace_id:032x}",
        "spanId": f"{span.context.span_id:016x}",
        "traceState": span.context.trace_state.to_header(),
        "flags": int(span.context.trace_flags) | _REMOTE_KNOWN | (_REMOTE if is_remote else 0),
        "name": span.name,
        "kind": span.kind.value + 1,  # the API counts from internal, 0; the protocol from unspecified, 0
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes or {}),
        "events": [
            {"timeUnixNano": str(event.timestamp), "name": event.name, "attributes": _attributes(event.attributes)}
            for event in span.events
        ],
        "status": {"code": span.status.status_code.value}
        | ({"message": span.status.description} if span.status.description else {}),
    }
    return found | ({"parentSpanId": f"{span.parent.span_id:016x}"} if span.parent else {})


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
        case _:
            return {"arrayValue": {"values": [_value(each) for each in value]}}
