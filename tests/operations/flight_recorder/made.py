"""Recordings of a job that never ran, written call by call."""

from dataclasses import replace

from minilib.operations.flight_recorder import Dump, RecordedCall, RecordedGroup

DP = RecordedGroup("dp", (0, 1, 2, 3))
LEFT, RIGHT = RecordedGroup("tp", (0, 1)), RecordedGroup("tp", (2, 3))
ODD, EVEN = RecordedGroup("pp", (1, 3)), RecordedGroup("pp", (0, 2))
SECOND = 10**9
NOW = 1000 * SECOND


class Job:
    """Dumps of ranks, written call by call."""

    def __init__(self, ranks=4):
        self.calls = {rank: [] for rank in range(ranks)}
        self.entered = {rank: {} for rank in range(ranks)}
        self.changes = {}

    def call(self, ranks, group, state="completed", at=0.0, took=0.001, op="all_reduce", **other):
        """A call of each of these ranks; `at` is in seconds before now, for calls that have not ended."""
        for rank in ranks:
            sequence = self.entered[rank].get(group, 0)
            if state != "refused":
                self.entered[rank][group] = sequence + 1
            start = NOW - int((at or 500 - sequence) * SECOND)
            is_open = state in ("scheduled", "started")
            fields = {"reduce_op": "sum", "root": None, "dtype": "float32", "shape": (4,), "site": f"train.py:{rank} f",
                      "asynchronous": False, "waiting": is_open} | other  # fmt: skip
            self.calls[rank].append(
                RecordedCall(
                    group=group,
                    sequence=sequence,
                    op=op,
                    state=state,
                    enqueued_ns=start,
                    started_ns=0 if state == "scheduled" else start,
                    ended_ns=0 if is_open else start + int(took * SECOND),
                    wait_ns=NOW - start if is_open else int(took * SECOND),
                    **fields,
                )
            )
        return self

    def dumps(self, without=(), keep=None):
        found = []
        for rank, calls in self.calls.items():
            last = calls[-keep[rank] :] if keep else calls
            lost = len(calls) - len(last)
            dump = Dump(rank, tuple(last), self.entered[rank], lost, read_ns=NOW, process="S")
            found.append(replace(dump, **self.changes.get(rank, {})))
        return [dump for dump in found if dump.rank not in without]
