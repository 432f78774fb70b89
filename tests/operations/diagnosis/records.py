"""Step records that are made up, for tests of detectors."""

from minilib.operations.diagnosis.step_record import PhaseTime, StepRecord
from minilib.training.phases import PHASES

MS = 1_000_000
USUAL = {"data": 0.1, "forward": 2, "backward": 3, "gradients": 0.2, "optimizer": 1, "loss": 0.1}


def record(rank, step, own=(), cpu_of_data=None, **fields):
    """A step with the usual times, in ms; `own` changes some, the rest of 20 ms is a wait for gradients.

    What `own` adds to the data phase is no processor time, unless `cpu_of_data` says so.
    """
    times = USUAL | dict(own)
    ran = times | {"data": cpu_of_data if cpu_of_data is not None else USUAL["data"]}
    phases = {name: PhaseTime(int(times[name] * MS), int(ran[name] * MS)) for name in PHASES}
    wait = max(0, 20 * MS - sum(phase.wall_ns for phase in phases.values()))
    phases["gradients"] = phases["gradients"].plus(PhaseTime(wait, 0, 0, wait))
    wall = sum(phase.wall_ns for phase in phases.values())
    values = {
        "samples": 4,
        "loss": 3.0,
        "grad_norm": 1.0,
        "own_grad_norm": 1.1,
        "rss_bytes": 100 * 2**20,
        "checksums": {"a": 1, "b": 2, "c": 3},
    } | fields
    return StepRecord(rank, step, step * 20 * MS, step * 20 * MS + wall, phases, **values)


def steps_of(count=14, ranks=4, change=lambda rank, step: {}):
    """So many steps of all ranks; `change` says what is unusual about one."""
    return [tuple(record(rank, step, **change(rank, step)) for rank in range(ranks)) for step in range(count)]
