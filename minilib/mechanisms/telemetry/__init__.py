"""Telemetry: histograms that merge, spans and their critical path, sampling with weights, outliers."""

from minilib.mechanisms.telemetry.histogram import Histogram
from minilib.mechanisms.telemetry.outliers import outliers
from minilib.mechanisms.telemetry.sampling import HeadSampler, TailSampler, expected_kept, rest_rate
from minilib.mechanisms.telemetry.spans import BrokenTrace, PathSegment, Span, Trace, traces_of

__all__ = [
    "BrokenTrace",
    "HeadSampler",
    "Histogram",
    "PathSegment",
    "Span",
    "TailSampler",
    "Trace",
    "expected_kept",
    "outliers",
    "rest_rate",
    "traces_of",
]
