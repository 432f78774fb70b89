"""What a machine can do, in four numbers that decide most designs (and a few more): FLOP/s, bytes/s, bytes, latencies.

A `Machine` is measured here, loaded from a record in results/, or read off a data sheet. All three have the same shape,
so anything priced on one can be priced on the others.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minilib.mechanisms.basics.format import Table, gib, si
from minilib.numbers import records
from minilib.numbers.neighbours import BUSY

DATASHEETS = Path(__file__).with_name("datasheets") / "datasheets.toml"


class UnknownMachine(LookupError):
    """No data sheet or record of that name; the message lists those there are."""


class NotOnThisMachine(LookupError):
    """The machine has no such dtype, link or figure; the message lists what it has."""


@dataclass(frozen=True)
class Link:
    """One way out of a device: NVLink, PCIe, a network.

    Args:
        bandwidth: bytes/s in ONE direction while the other is as busy; vendors like to print the sum of both.
        latency: seconds for an empty message, one way; 0 where nobody says.
    """

    bandwidth: float
    latency: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A device with its memory, its links and what they achieve.

    Args:
        name: short name in file names, such as "nvidia-h200".
        title: as people write it.
        kind: "cpu" or "gpu".
        origin: "measured" or "datasheet".
        flops: dense FLOP/s (int8: OP/s) by dtype, such as {"bf16": 989e12}.
        memory_bandwidth: bytes/s of main memory or HBM, reads plus writes.
        memory_bytes: bytes of it.
        call_overhead: seconds from one small call or kernel launch to the next; 0 on a data sheet, which never says.
        asynchronous: True where a call returns before its work is done, so that its overhead can hide behind work.
        links: ways out, by name.
        seconds: other latencies by name, in seconds.
        bandwidths: other rates by name, in bytes/s.
        random_access: (working set in bytes, seconds per dependent load), ascending.
        caches: bytes of each cache by level.
        watts: board or socket power, None where not known.
        sources: where data-sheet figures come from, by group.
        busy: share of the cores that others took while it was measured; None where nobody watched.
    """

    name: str
    title: str
    kind: str
    origin: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    memory_bytes: float
    call_overhead: float = 0.0
    asynchronous: bool = False
    links: Mapping[str, Link] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bandwidths: Mapping[str, float] = field(default_factory=dict)
    random_access: tuple[tuple[int, float], ...] = ()
    caches: Mapping[str, int] = field(default_factory=dict)
    watts: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    busy: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "gpu"):
            raise ValueError(f"kind is 'cpu' or 'gpu', got {self.kind!r}")
        if not (self.memory_bandwidth > 0 and self.memory_bytes > 0 and self.flops):
            raise ValueError(f"{self.name}: memory bandwidth, memory size and at least one FLOP/s figure are needed")

    # Where machines come from

    @classmethod
    def measure(cls, device: str = "auto", *, refresh: bool = False, progress: bool = True) -> Machine:
        """Measure this machine, or return what was measured before with the same library versions.

        A machine that was busy with something else is measured anew by the next call; `busy` and the table say so.

        Args:
            device: "cpu", "cuda", or "auto" for the GPU if there is one.
            refresh: measure again even if a cached result is at hand.
            progress: show a progress bar while measuring.

        Cost: at most 20 s the first time, half a second to check what is remembered after that.
        """
        from minilib.numbers.probes import survey

        return cls.from_dict(survey.measure_or_recall(device, refresh=refresh, progress=progress))

    @classmethod
    def load(cls, name: str) -> Machine:
        """A machine that was measured elsewhere and recorded under results/.

        Raises:
            RecordNotFound: if there is no such record, naming those there are.
        """
        return cls.from_dict(records.load(name, "machine").data)

    @classmethod
    def datasheet(cls, name: str) -> Machine:
        """A machine as its vendor describes it: dense FLOP/s, one direction of each link, GB = 1e9.

        Raises:
            UnknownMachine: if there is no such data sheet, naming those there are.
        """
        sheets = tomllib.loads(DATASHEETS.read_text())
        if name not in sheets:
            raise UnknownMachine(f"no data sheet {name!r}; there are: {', '.join(sorted(sheets))}")
        sheet = sheets[name]
        return cls(
            name=name,
            title=sheet["title"],
            kind=sheet["kind"],
            origin="datasheet",
            flops=sheet["flops"],
            memory_bandwidth=sheet["memory_bandwidth"],
            memory_bytes=sheet["memory_bytes"],
            asynchronous=sheet["kind"] == "gpu",
            links={k: Link(v["bandwidth"], v.get("latency", 0.0)) for k, v in sheet.get("links", {}).items()},
            watts=sheet["watts"],
            sources=sheet["sources"],
        )

    @staticmethod
    def datasheets() -> list[str]:
        """Names that `datasheet` knows."""
        return sorted(tomllib.loads(DATASHEETS.read_text()))

    @classmethod
    def from_dict(cls, data: Mapping) -> Machine:
        """The inverse of `to_dict`, from JSON values."""
        links = {name: Link(**link) for name, link in data["links"].items()}
        chain = tuple((int(size), float(seconds)) for size, seconds in data["random_access"])
        return cls(**{**data, "links": links, "random_access": chain})

    def to_dict(self) -> dict:
        """JSON values that `from_dict` reads back."""
        return asdict(self)

    # What it answers

    def peak(self, dtype: str) -> float:
        """FLOP/s in one dtype.

        Raises:
            NotOnThisMachine: if this machine has no figure for it.
        """
        return _get(self.flops, dtype, f"{self.title} has no FLOP/s for dtype")

    def link(self, name: str | None = None) -> Link:
        """One of its links; without a name, its only one.

        Raises:
            NotOnThisMachine: if there is no such link, or no name was given and there is not exactly one.
        """
        if name is None:
            if len(self.links) != 1:
                raise NotOnThisMachine(f"say which link of {self.title}: {', '.join(self.links) or 'it has none'}")
            return next(iter(self.links.values()))
        return _get(self.links, name, f"{self.title} has no link")

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte at which arithmetic takes as long as memory: below it a large operation is memory-bound."""
        return self.peak(dtype) / self.memory_bandwidth

    def load_latency(self, working_set: int) -> float:
        """Seconds per dependent load at the smallest probed working set that is at least this large.

        Raises:
            NotOnThisMachine: if random access was not measured here.
        """
        if not self.random_access:
            raise NotOnThisMachine(f"{self.title} has no measured random access")
        larger = [seconds for size, seconds in self.random_access if size >= working_set]
        return larger[0] if larger else self.random_access[-1][1]

    def table(self) -> Table:
        """Everything known about this machine, a row a figure."""
        rows = [("memory", gib(self.memory_bytes)), ("memory bandwidth", si(self.memory_bandwidth, "B/s"))]
        rows += [(f"{dtype} matmul", si(rate, _rate_unit(dtype))) for dtype, rate in self.flops.items()]
        if self.call_overhead:
            rows.append(("one small torch call", si(self.call_overhead, "s")))
        rows += [(f"{level} cache", f"{size / 2**10:,.0f} KiB") for level, size in self.caches.items()]
        rows += [(f"random load in {size / 2**10:,.0f} KiB", si(s, "s")) for size, s in self.random_access]
        rows += [(_words(name), si(value, "s")) for name, value in self.seconds.items()]
        rows += [(_words(name), si(value, "B/s")) for name, value in self.bandwidths.items()]
        rows += [(f"{name} link, each way", si(link.bandwidth, "B/s")) for name, link in self.links.items()]
        if self.watts:
            rows.append(("power", si(self.watts, "W")))
        if self.busy is not None and self.busy > BUSY:
            rows.append(("measured on a busy machine: others took", f"{self.busy:.0%} of the cores"))
        return Table((f"{self.title} ({self.origin})", ""), rows)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _get(mapping: Mapping, key: str, complaint: str):
    if key not in mapping:
        raise NotOnThisMachine(f"{complaint} {key!r}; it has: {', '.join(mapping) or 'none'}")
    return mapping[key]


def _rate_unit(dtype: str) -> str:
    return "OP/s" if dtype.startswith("int") else "FLOP/s"


def _words(name: str) -> str:
    return name.replace("_", " ")
