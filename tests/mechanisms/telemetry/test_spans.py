"""Traces: paths that add up to the nanosecond, self times counted by brute force, and spans that are no tree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.telemetry import BrokenTrace, Span, Trace, traces_of


def span(name, start, end, parent=None, trace_id="t"):
    return Span(name, trace_id, name, parent, f"process of {name}", start, end)


REQUEST = [
    span("request", 0, 100),
    span("auth", 10, 20, "request"),
    span("catalog", 25, 80, "request"),
    span("shard 0", 30, 50, "catalog"),
    span("shard 1", 30, 70, "catalog"),
]


def path(trace):
    return [(segment.span.name, segment.start_ns, segment.end_ns) for segment in trace.critical_path()]


def test_the_path_follows_what_was_waited_for():
    assert path(Trace(REQUEST)) == [
        ("request", 0, 10),
        ("auth", 10, 20),
        ("request", 20, 25),
        ("catalog", 25, 30),
        ("shard 1", 30, 70),
        ("catalog", 70, 80),
        ("request", 80, 100),
    ]


def test_self_time_is_what_no_child_covers():
    trace = Trace(REQUEST[::-1])
    assert {span.name: trace.self_ns(span) for span in trace.spans} == {
        "request": 35,
        "auth": 10,
        "catalog": 15,
        "shard 0": 20,
        "shard 1": 40,
    }
    assert [span.name for span in trace.children(trace.root)] == ["auth", "catalog"]
    assert [span.name for span in trace.descend(trace.root)] == ["request", "auth", "catalog", "shard 1", "shard 0"]


def test_a_retry_is_on_the_path_with_its_failed_attempt_and_its_pause():
    trace = Trace([span("call", 0, 90), span("first", 0, 30, "call"), span("second", 50, 90, "call")])
    assert path(trace) == [("first", 0, 30), ("call", 30, 50), ("second", 50, 90)]


def test_children_outside_their_parent_are_cut_off():
    """Fire and forget, a clock that is behind, and a child that never touched its parent."""
    trace = Trace(
        [
            span("root", 100, 200),
            span("late", 150, 300, "root"),
            span("early", 50, 120, "root"),
            span("after", 250, 260, "root"),
            span("below late", 160, 290, "late"),
        ]
    )
    assert path(trace) == [("early", 100, 120), ("root", 120, 150), ("late", 150, 160), ("below late", 160, 200)]
    assert trace.self_ns(trace.root) == 30


def test_empty_spans_and_a_root_alone():
    assert path(Trace([span("root", 5, 5)])) == [] and Trace([span("root", 5, 5)]).duration_ns == 0
    assert path(Trace([span("root", 0, 9), span("none", 4, 4, "root")])) == [("root", 0, 9)]


def test_a_chain_of_thousands_is_no_recursion():
    spans = [span("0", 0, 20_000)]
    spans += [span(str(depth), depth, 20_000, str(depth - 1)) for depth in range(1, 5000)]
    assert len(Trace(spans).critical_path()) == 5000


@st.composite
def trees(draw):
    spans = [span("0", *sorted(draw(st.tuples(st.integers(0, 60), st.integers(0, 60)))))]
    for number in range(1, draw(st.integers(1, 12))):
        start, end = sorted(draw(st.tuples(st.integers(0, 60), st.integers(0, 60))))
        spans.append(span(str(number), start, end, str(draw(st.integers(0, number - 1)))))
    return Trace(draw(st.permutations(spans)))


@given(trees())
def test_a_path_is_without_gaps_and_adds_up_to_the_root(trace):
    segments = trace.critical_path()
    assert sum(segment.duration_ns for segment in segments) == trace.duration_ns
    for segment in segments:
        assert segment.span.start_ns <= segment.start_ns < segment.end_ns <= segment.span.end_ns
    for before, after in zip(segments, segments[1:], strict=False):
        assert before.end_ns == after.start_ns
    if segments:
        assert (segments[0].start_ns, segments[-1].end_ns) == (trace.root.start_ns, trace.root.end_ns)


@given(trees())
def test_self_times_are_those_of_counting_moment_by_moment(trace):
    for one in trace.spans:
        covered = {t for child in trace.children(one) for t in range(child.start_ns, child.end_ns)}
        assert trace.self_ns(one) == len(set(range(one.start_ns, one.end_ns)) - covered)


def test_an_orphan_is_reported_and_counts_nowhere():
    trace = Trace([span("root", 0, 10), span("lost", 2, 9, "gone"), span("below", 3, 8, "lost")])
    assert [orphan.name for orphan in trace.orphans] == ["lost"]
    assert path(trace) == [("root", 0, 10)] and trace.self_ns(trace.root) == 10


def test_spans_of_many_requests_become_traces_in_their_order():
    mixed = [span("a", 0, 9, trace_id="x"), span("b", 1, 2, trace_id="y"), span("c", 3, 4, "a", trace_id="x")]
    assert [(trace.trace_id, len(trace.spans)) for trace in traces_of(mixed)] == [("x", 2), ("y", 1)]
    assert traces_of([]) == []


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "got 0"),
        ([span("a", 0, 1), span("b", 0, 1)], "got 2"),
        ([span("a", 0, 1), span("a", 0, 1, "a")], "2 spans have 1 ids"),
        ([span("a", 0, 1), span("b", 0, 1, "a", trace_id="u")], "one trace id"),
        ([span("r", 0, 1), span("a", 0, 1, "b"), span("b", 0, 1, "a")], "2 spans are their own ancestors"),
        ([span("r", 0, 1), span("a", 0, 1, "a")], "1 spans are their own ancestors"),
    ],
)
def test_what_is_no_tree_is_named(spans, message):
    with pytest.raises(BrokenTrace, match=message):
        Trace(spans)


def test_impossible_spans_are_refused_and_equal_ones_are_equal():
    with pytest.raises(ValueError, match="ends 3 ns before"):
        span("a", 5, 2)
    for trace_id, span_id, parent in (("", "a", None), ("t", "", None), ("t", "a", "")):
        with pytest.raises(ValueError, match="not empty"):
            Span("a", trace_id, span_id, parent, "p", 0, 1)
    assert span("a", 0, 1) == span("a", 0, 1) and hash(span("a", 0, 1)) == hash(span("a", 0, 1))
    assert span("a", 0, 7).duration_ns == 7 and span("a", 0, 7).attributes == {}
