"""The header that carries a trace from one process to the next.

    traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
                 version  trace id         id of the calling span     flags: 01 is sampled

Source: W3C, "Trace Context", Recommendation, 2021, section 3.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEADER = "traceparent"
_SAMPLED = 0x01
_FORMAT = re.compile("([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)


@dataclass(frozen=True)
class TraceContext:
    """What a callee needs to know of its caller.

    Args:
        trace_id: 32 hexadecimal digits in lower case, not all 0.
        span_id: of the calling span, 16 hexadecimal digits in lower case, not all 0.
        sampled: whether the caller may have recorded the trace.

    Raises:
        ValueError: if an id is none.
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    def __post_init__(self) -> None:
        for what, digits, found in (("trace", 32, self.trace_id), ("span", 16, self.span_id)):
            if not re.fullmatch(f"[0-9a-f]{{{digits}}}", found) or not int(found, 16):
                raise ValueError(f"the id of a {what} has {digits} hexadecimal digits, not all 0, got {found!r}")

    def encode(self) -> str:
        """The header's value, of version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED * self.sampled:02x}"


def parse_traceparent(value: str | None) -> TraceContext | None:
    """The context in a header's value; None if there is none, or it is malformed: the callee then begins a trace.

    Later versions may add fields at the end and flags, which are not looked at; version ff is none. Of version 00
    there is one form only.
    """
    match = _FORMAT.fullmatch(value or "")
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5] is not None):
        return None
    try:
        return TraceContext(match[2], match[3], bool(int(match[4], 16) & _SAMPLED))
    except ValueError:  # an id of zeros
        return None
