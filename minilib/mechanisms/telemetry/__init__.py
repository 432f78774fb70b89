"""Telemetry: histograms that merge, spans and their critical path, sampling, outliers, a ring that outlasts a crash."""

from minilib.mechanisms.telemetry.histogram import Histogram
from minilib.mechanisms.telemetry.outliers import outliers
from minilib.mechanisms.telemetry.ring import Ring, RingRecord, slot_bytes
from minilib.mechanisms.telemetry.sampling import HeadSampler, TailSampler, expected_kept, rest_rate
from minilib.mechanisms.telemetry.spans import BrokenTrace, PathSegment, Span, Trace, traces_of

__all__ = [
    "BrokenTrace",
    "HeadSampler",
    "Histogram",
    "PathSegment",
    "Ring",
    "RingRecord",
    "Span",
    "TailSampler",
    "Trace",
    "expected_kept",
    "outliers",
    "rest_rate",
    "slot_bytes",
    "traces_of",
]
