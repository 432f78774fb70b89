"""A server whose requests are spans in memory, for the tests beside this file."""

import time
from contextlib import contextmanager

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from minilib.operations.tracing.request_spans import RequestSpans
from tests.serving.server.api import MODEL, PATIENCE, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
ASKED = {"model": MODEL, "prompt": "import os\n", "max_tokens": 4, "ignore_eos": True, "temperature": 0}


class Spans:
    """A provider, and the spans that it has been given."""

    def __init__(self, service="server", **options):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(resource=Resource({"service.name": service}), **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def finished(self, count):
        """So many spans, as soon as they are there: a response may be read before its request has ended."""
        give_up = time.monotonic() + PATIENCE
        while len(self.exporter.get_finished_spans()) < count:
            assert time.monotonic() < give_up, [span.name for span in self.exporter.get_finished_spans()]
            time.sleep(0.002)
        found = sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))
        self.exporter.clear()
        assert len(found) == count, [span.name for span in found]
        return found


@contextmanager
def observed(engine=None, kept_by=None, **options):
    """A server, and its spans."""
    spans = Spans(**({"sampler": options.pop("sampler")} if "sampler" in options else {}))
    with running(engine, observer=RequestSpans(spans.provider, MODEL, kept_by), **options) as server:
        yield server, spans
