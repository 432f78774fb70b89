"""The header against OpenTelemetry's own propagator: what one accepts the other accepts, and reads alike."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from minilib.classic.observed_service.traceparent import HEADER, TraceContext, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


def by_opentelemetry(value):
    """The same header as OpenTelemetry's SDK reads it."""
    context = TraceContextTextMapPropagator().extract({HEADER: value}, context={})
    span = get_current_span(context).get_span_context()
    if not span.is_valid:
        return None
    return TraceContext(f"{span.trace_id:032x}", f"{span.span_id:016x}", bool(span.trace_flags & 1))


@st.composite
def damaged(draw):
    """A good header with a few characters replaced, removed, or added."""
    text = list(GOOD)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from(["", "0", "f", "F", "-", "g", "00", "-x", "é"]))
    return "".join(text)


@given(damaged())
@example(GOOD)
@example(GOOD.upper())
@example(GOOD + "-extra")
@example("01" + GOOD[2:])
@example("01" + GOOD[2:] + "-what.a.later.version.adds")
@example("01" + GOOD[2:] + "x")
@example("ff" + GOOD[2:])
@example(f"00-{'0' * 32}-{SPAN}-01")
@example(f"00-{TRACE}-{'0' * 16}-01")
@example(GOOD[:-2] + "ff")
@example(GOOD[:-2] + "02")
def test_a_header_is_read_as_opentelemetry_reads_it(value):
    assert parse_traceparent(value) == by_opentelemetry(value)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_what_is_written_is_read_by_both(trace_id, span_id, sampled):
    context = TraceContext(f"{trace_id:032x}", f"{span_id:016x}", sampled)
    assert parse_traceparent(context.encode()) == context == by_opentelemetry(context.encode())


@pytest.mark.parametrize("value", [None, "", "00", GOOD + ", " + GOOD, GOOD + "\n", " " + GOOD, GOOD[:-1]])
def test_what_is_no_header_begins_a_new_trace(value):
    """Two headers come as one with a comma; a line's end and spaces around a value are not part of it."""
    assert parse_traceparent(value) is None


def test_ids_that_are_none_are_refused():
    for trace_id, span_id in (("0" * 32, SPAN), (TRACE, "0" * 16), (TRACE[1:], SPAN), (TRACE.upper(), SPAN)):
        with pytest.raises(ValueError, match="hexadecimal digits, not all 0"):
            TraceContext(trace_id, span_id)
