"""Figures quoted from others (minilib/numbers/quoted.toml): every one has a unit, a year and a source."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace

from minilib.mechanisms.basics.format import Table, si

QUOTED = Path(__file__).with_name("quoted.toml")
GROUPS = ("network", "storage", "gpu", "rental", "claim")


class NotQuoted(LookupError):
    """No such figure is quoted; the message lists those there are."""


def value(group: str, name: str) -> float:
    """One quoted figure in SI base units, such as ``value("storage", "nvme_read")``.

    Raises:
        NotQuoted: if there is no such figure, naming those of the group.
    """
    return _entry(group, name)["value"]


def model(name: str) -> SimpleNamespace:
    """A published model's shape: layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, parameters.

    A mixture of experts has experts, top_k and active_parameters, too.

    Raises:
        NotQuoted: if there is no such model, naming those there are.
    """
    return SimpleNamespace(**_entry("model", name))


def runs() -> list[SimpleNamespace]:
    """Published pre-training runs, oldest first.

    Each has title, year, parameters (those that a token passes through), tokens, hours (of all GPUs together), gpu (a
    data sheet), what and source. Where a source says how fast steps run, it has `running`, the ends of its share of
    the dense bf16 peak, or `tokens_per_second` of one GPU.
    """
    return [SimpleNamespace(**entry) for entry in _read()["run"].values()]


def latency() -> list[tuple[str, str, float | None, float | None]]:
    """Jeff Dean's numbers as (key, what, seconds in 2009, seconds in 2012); None where a version has no such row."""
    return [(row["key"], row["what"], row.get("y2009"), row.get("y2012")) for row in _read()["latency"]["rows"]]


def table(*groups: str) -> Table:
    """The quoted figures of some groups, with their sources."""
    rows = [
        (f"{group}: {name.replace('_', ' ')}", si(entry["value"], entry["unit"]), entry["what"], entry["source"])
        for group in groups
        for name, entry in _read()[group].items()
    ]
    return Table(("quoted", "", "what", "source"), rows)


def _entry(group: str, name: str) -> dict:
    entries = _read().get(group, {})
    if name not in entries:
        raise NotQuoted(f"nothing is quoted as {group}/{name}; there is: {', '.join(entries) or 'no such group'}")
    return entries[name]


def _read() -> dict:
    return tomllib.loads(QUOTED.read_text(encoding="utf-8"))
