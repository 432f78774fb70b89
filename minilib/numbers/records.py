"""Measured figures in and out of results/, each with where it came from. A figure without provenance is refused."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from minilib.mechanisms.basics.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
REQUIRED = ("machine", "date", "commit", "command", "versions")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


class ProvenanceError(ValueError):
    """A record does not say where its figures came from."""


class RecordNotFound(LookupError):
    """No such record; the message lists what there is."""


@dataclass(frozen=True)
class Record:
    """Figures that one command measured on one machine.

    Args:
        name: what was measured, such as "machine" or "workloads"; also the file name.
        data: the figures, JSON values in SI base units.
        provenance: machine (title), date (ISO), commit, command, versions (python, torch, …).

    Raises:
        ProvenanceError: if a provenance field is missing or empty.
    """

    name: str
    data: Mapping[str, object]
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name)
        missing = [key for key in REQUIRED if not self.provenance.get(key)]
        if missing:
            raise ProvenanceError(
                f"record {self.name!r} does not say its {', '.join(missing)}; "
                "make it with records.stamp(), which fills all of them in"
            )

    def save(self, machine: str, root: Path = RESULTS) -> Path:
        """Write ``results/<machine>/<name>.json`` and return its path."""
        path = root / _check_name(machine) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
        return path

    @property
    def label(self) -> str:
        """Machine and day, to stand beside a recorded figure."""
        return f"{self.provenance['machine']}, {str(self.provenance['date'])[:10]}"


def stamp(name: str, data: Mapping[str, object], machine_title: str) -> Record:
    """A record of figures that this process has just measured, with its provenance filled in."""
    provenance = {
        "machine": machine_title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": _command(),
        "versions": library_versions(),
    }
    return Record(name, data, provenance)


def load(machine: str, name: str, root: Path = RESULTS) -> Record:
    """Read one record back.

    Raises:
        RecordNotFound: if there is none, naming those there are.
        ProvenanceError: if the file does not say where its figures came from.
    """
    path = root / machine / f"{name}.json"
    if not path.is_file():
        there = ", ".join(f"{m}/{name}" for m in machines(name, root)) or "none yet"
        raise RecordNotFound(f"no record {machine}/{name}; recorded so far: {there}")
    return Record(**json.loads(path.read_text()))


def beside(name: str, live: Mapping[str, object] | None = None, root: Path = RESULTS) -> dict[str, Mapping]:
    """The figures called `name` from every recorded machine, after those of this machine if they are given.

    Returns:
        Column heading ("this machine, live", or title and date) → figures, live first.
    """
    columns: dict[str, Mapping] = {} if live is None else {"this machine, live": live}
    for machine in machines(name, root):
        record = load(machine, name, root)
        columns[record.label] = record.data
    return columns


def machines(name: str = "machine", root: Path = RESULTS) -> list[str]:
    """Names of the machines that have a record called `name`, sorted."""
    return sorted(path.parent.name for path in root.glob(f"*/{name}.json"))


def library_versions() -> dict[str, str]:
    """Versions of what decides a measurement: Python and those of torch, triton and numpy that are installed."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The checked-out commit, marked when tracked code outside results/ differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no git)"
    return (commit or "unknown (not a git checkout)") + (" with changes" if changed else "")


def _command() -> str:
    """The command line of this process without any path of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return shlex.join(["python", *words])


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a record or machine name is lower-case letters, digits, '-' and '.', got {name!r}")
    return name
