"""Price an operation before running it: Cost (FLOPs, bytes, messages) on a Machine gives a Prediction (seconds, bound).

The model has four terms. Arithmetic, memory and communication are done by different units and overlap; the overhead of
the calls themselves hides behind them on an asynchronous device and adds to them on a synchronous one:

    GPU: seconds = max(compute, memory, communication, overhead)
    CPU: seconds = max(compute, memory, communication) + overhead

Source: Williams, Waterman and Patterson, "Roofline" (CACM 2009) for the first two terms; Hockney's α–β model for
communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from minilib.mechanisms.basics.format import Table, si
from minilib.numbers.machine import Machine

BOUNDS = ("compute", "memory", "communication", "overhead")
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}  # of a value of each dtype in memory


@dataclass(frozen=True)
class Cost:
    """What one operation must do, whoever does it.

    Costs of the same dtype add (``+``) when the operations are fused into one, and scale (``3 * cost``). To run one
    operation after another, price each and add the predictions: a sequence cannot overlap what it does not know yet.

    Args:
        flops: floating-point operations; a multiply-add is two.
        bytes: bytes read plus bytes written in main memory or HBM.
        messages: messages sent by the busiest participant, one after another.
        message_bytes: bytes that these messages carry altogether.
        calls: calls or kernel launches it takes.
        dtype: the dtype that the FLOPs are done in.

    Raises:
        ValueError: if a count is negative or not a number.
    """

    flops: float = 0
    bytes: float = 0
    messages: float = 0
    message_bytes: float = 0
    calls: float = 0
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("flops", "bytes", "messages", "message_bytes", "calls"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} counts work and must be a number ≥ 0, got {value!r}")

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        if self.flops and other.flops and self.dtype != other.dtype:
            raise ValueError(
                f"cannot add FLOPs in {self.dtype} to FLOPs in {other.dtype}: they run at different rates; "
                "price each cost and add the predictions"
            )
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.messages + other.messages,
            self.message_bytes + other.message_bytes,
            self.calls + other.calls,
            self.dtype if self.flops or not other.flops else other.dtype,
        )

    def __mul__(self, times: float) -> Cost:
        return replace(
            self,
            flops=self.flops * times,
            bytes=self.bytes * times,
            messages=self.messages * times,
            message_bytes=self.message_bytes * times,
            calls=self.calls * times,
        )

    __rmul__ = __mul__

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte of memory traffic; infinite where no byte moves."""
        return self.flops / self.bytes if self.bytes else math.inf


@dataclass(frozen=True)
class Prediction:
    """What an operation should take on a machine, and which of its resources decides.

    Args:
        terms: seconds that each resource is busy, keyed by BOUNDS.
        seconds: the predicted time.
        machine: the machine it was priced on.
        cost: what was priced; None for a sum of predictions.
    """

    terms: dict[str, float]
    seconds: float
    machine: Machine = field(repr=False)
    cost: Cost | None = None

    @property
    def bound(self) -> str:
        """The busiest resource: "compute", "memory", "communication" or "overhead"."""
        return max(BOUNDS, key=lambda name: self.terms[name])

    def __add__(self, other: Prediction) -> Prediction:
        """First this, then that."""
        if not isinstance(other, Prediction):
            return NotImplemented
        if other.machine is not self.machine and other.machine != self.machine:
            raise ValueError(f"cannot add a price on {other.machine.title} to one on {self.machine.title}")
        terms = {name: self.terms[name] + other.terms[name] for name in BOUNDS}
        return Prediction(terms, self.seconds + other.seconds, self.machine)

    def __str__(self) -> str:
        return f"{si(self.seconds, 's')} on {self.machine.title}, {self.bound}-bound"

    def table(self) -> Table:
        """The terms, a row each."""
        rows = [(name, si(self.terms[name], "s"), "← bound" if name == self.bound else "") for name in BOUNDS]
        return Table(("resource", "busy for", ""), [*rows, ("predicted", si(self.seconds, "s"), "")])


def price(cost: Cost, machine: Machine, link: str | None = None) -> Prediction:
    """Predict how long `cost` takes on `machine`.

    Args:
        cost: what must be done.
        machine: measured or from a data sheet.
        link: which of the machine's links carries the messages; its only one if left out.

    Raises:
        NotOnThisMachine: if the machine has no figure for the dtype or no such link.
    """
    terms = dict.fromkeys(BOUNDS, 0.0)
    if cost.flops:
        terms["compute"] = cost.flops / machine.peak(cost.dtype)
    terms["memory"] = cost.bytes / machine.memory_bandwidth
    if cost.messages or cost.message_bytes:
        way = machine.link(link)
        terms["communication"] = cost.messages * way.latency + cost.message_bytes / way.bandwidth
    terms["overhead"] = cost.calls * machine.call_overhead
    work = max(terms["compute"], terms["memory"], terms["communication"])
    seconds = max(work, terms["overhead"]) if machine.asynchronous else work + terms["overhead"]
    return Prediction(terms, seconds, machine, cost)
