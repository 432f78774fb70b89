#!/usr/bin/env bash
# FastAPI makes spans of its own as soon as a tracer provider of OpenTelemetry is set for the process: nobody asks for
# them, and whoever instruments the server has two spans of each request.
# The way round: pass tracers on by hand, and set no provider for the process.
. "$(dirname "$0")/environment.sh" "fastapi==0.165.0" "httpx==0.28.1" "opentelemetry-sdk==1.45.2"

observe <<'EOF'
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
app = FastAPI()


@app.get("/items/{number}")
def item(number: int):
    return number


def spans():
    TestClient(app).get("/items/7")
    found = [(span.name, span.kind.name) for span in exporter.get_finished_spans()]
    exporter.clear()
    return found


print("fastapi", version("fastapi"))
print("no provider:", spans())
trace.set_tracer_provider(provider)
print("a provider is set:", spans())
EOF
expect <<'EOF'
fastapi 0.165.0
no provider: []
a provider is set: [('fastapi.dependencies', 'INTERNAL'), ('fastapi.endpoint', 'INTERNAL'), ('fastapi.serialization', 'INTERNAL'), ('GET /items/{number}', 'SERVER')]
EOF
