"""Recordings for the tests beside this file: made by hand, on a clock that the test moves."""

from minilib.operations.tracing.rank_trace import RankTrace


class Clock:
    """A clock in ns that stands still until it is moved."""

    def __init__(self, now=1_000_000):
        self.now = now

    def __call__(self):
        return self.now

    def move(self, ns):
        self.now += ns


def step_of(rank, late_ns=0, begin=1_000_000, **options):
    """A step: forward, which takes `late_ns` longer, an all-reduce that ends for all at one time, and a counter."""
    clock = Clock(begin)
    trace = RankTrace(rank, clock=clock, host=f"host-{rank // 2}", **options)
    with trace.span("step", number=3):
        trace.count("allocated bytes", 100 + rank)
        with trace.span("forward"):
            clock.move(500 + late_ns)
        with trace.collective("all_reduce", "data", 7, num_bytes=4096):
            clock.now = begin + 10_000
        trace.count("allocated bytes", 50 + rank)
        clock.move(10)
    return trace
