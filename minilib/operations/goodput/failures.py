"""What fails in a job, how often, and what is lost with it: rates per GPU, per host, per rack and per job.

    table = llama_3_interruptions()          419 in 54 days on 16,384 GPUs, by cause
    table.causes()                           as rates of one component
    mtbf_seconds(table.causes(), Fleet(1024))    of a job of another size

Failures of a kind come at a constant rate, so the rates of all components add up, and a job on twice as many fails
twice as often. Lemons break that: a few hosts that fail far more often than others.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minilib.mechanisms.basics.checks import check_quantity, check_whole

REPORTS = Path(__file__).with_name("reports.toml")
LOSSES = ("process", "host", "rack")  # each takes along what the one before does
HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Fleet:
    """The machines of a job.

    Args:
        gpus: in all.
        gpus_per_host: the last host may have fewer.
        hosts_per_rack: that one switch connects.

    Raises:
        ValueError: if one is not a whole number of at least 1.
    """

    gpus: int
    gpus_per_host: int = 8
    hosts_per_rack: int = 2

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_host", "hosts_per_rack"):
            check_whole(name, getattr(self, name), 1)

    @property
    def hosts(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_host)

    @property
    def racks(self) -> int:
        return math.ceil(self.hosts / self.hosts_per_rack)

    def count(self, per: str) -> int:
        """How many there are of what a rate is per."""
        return {"gpu": self.gpus, "host": self.hosts, "rack": self.racks, "job": 1}[per]


@dataclass(frozen=True)
class FailureCause:
    """Something that interrupts a job.

    Args:
        name: for reports.
        per: "gpu", "host", "rack" or "job": what the rate is of one of.
        per_hour: failures of one of these.
        loses: "process", whose host keeps its memory; "host", with all its memory; or "rack", with all its hosts.

    Raises:
        ValueError: if an argument is none of these.
    """

    name: str
    per: str
    per_hour: float
    loses: str = "host"

    def __post_init__(self) -> None:
        if self.per not in ("gpu", "host", "rack", "job") or self.loses not in LOSSES:
            raise ValueError(f"per is gpu, host, rack or job, and loses one of {', '.join(LOSSES)}; {self.name} has "
                             f"{self.per!r} and {self.loses!r}")  # fmt: skip
        check_quantity(f"failures per hour of {self.name}", self.per_hour)


@dataclass(frozen=True)
class LemonHosts:
    """A few hosts that fail more often than the others; the mean rate over all hosts stays that of the causes.

    Args:
        share: of the hosts.
        factor: how many times as often as another host one of them fails.
        evict_after: failures of one host after which it is replaced for good by a host that is none; None for never.

    Raises:
        ValueError: if an argument is out of range.
    """

    share: float = 0.0
    factor: float = 1.0
    evict_after: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of lemons is from 0 to 1; got {self.share!r}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"a lemon fails at least as often as another host: factor ≥ 1; got {self.factor!r}")
        if self.evict_after is not None:
            check_whole("evict_after", self.evict_after, 1)

    def count(self, fleet: Fleet) -> int:
        """Lemons among a fleet's hosts, rounded."""
        return round(self.share * fleet.hosts)

    def of_others(self, fleet: Fleet) -> float:
        """The rate of a host that is no lemon, as a share of the mean rate of all hosts."""
        return fleet.hosts / (fleet.hosts + self.count(fleet) * (self.factor - 1))


@dataclass(frozen=True)
class InterruptionTable:
    """A published table of interruptions.

    Args:
        fleet: that they befell.
        days: over which.
        planned: interruptions beside the unexpected.
        rows: as reports.toml has them.
    """

    fleet: Fleet
    days: float
    planned: int
    rows: tuple[dict, ...]

    @property
    def unexpected(self) -> int:
        return sum(row["count"] for row in self.rows)

    def share(self, *names: str) -> float:
        """Of the unexpected interruptions, by the counts; the printed percentages differ for some."""
        return sum(row["count"] for row in self.rows if row["name"] in names) / self.unexpected

    def causes(self, planned: bool = False) -> list[FailureCause]:
        """Rates that give these counts, on average, on this fleet.

        Args:
            planned: with planned interruptions, as one more cause.
        """
        rows = [*self.rows]
        if planned:
            rows.append({"name": "planned", "count": self.planned, "per": "job", "loses": "process"})
        hours = self.days * 24
        return [
            FailureCause(row["name"], row["per"], row["count"] / self.fleet.count(row["per"]) / hours, row["loses"])
            for row in rows
        ]


def llama_3_interruptions() -> InterruptionTable:
    """The interruptions of Llama 3 405B's pre-training.

    Source: Grattafiori et al. 2024, arXiv 2407.21783, table 5. It prints 30.1 % for faulty GPUs, of which its counts
    make 35.3 %, and so 58.7 % for all GPU issues, which are 64.0 %.
    """
    table = tomllib.loads(REPORTS.read_text(encoding="utf-8"))["llama_3"]
    fleet = Fleet(table["gpus"], table["gpus_per_host"], table["hosts_per_rack"])
    return InterruptionTable(fleet, table["days"], table["planned"], tuple(table["causes"]))


def interruptions_per_hour(causes: Sequence[FailureCause], fleet: Fleet) -> float:
    """Failures of a whole job per hour that it runs."""
    return sum(cause.per_hour * fleet.count(cause.per) for cause in causes)


def mtbf_seconds(causes: Sequence[FailureCause], fleet: Fleet) -> float:
    """Mean time between failures of a whole job; infinite if nothing fails."""
    rate = interruptions_per_hour(causes, fleet)
    return HOUR / rate if rate else math.inf
