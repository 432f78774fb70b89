"""What makes several files one: a manifest that is written last, and holds size and digest of each.

A snapshot of a store and a checkpoint of many ranks are committed once their manifest is there and whole. A part that
is missing, short or changed is found by its digest, and named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from zlib import crc32

from minilib.mechanisms.journaling.segment import JournalDamaged, UnknownFormat

FORMAT = "journal manifest 1"
ALGORITHMS = ("sha256", "crc32")  # against any change; against chance, at several times the speed


class ManifestDamaged(JournalDamaged):
    """A manifest that was published is not whole."""


class PartDamaged(JournalDamaged):
    """A part is not what its manifest says."""


def digest(buffers: Iterable[bytes | memoryview], algorithm: str = "sha256") -> str:
    """The digest of bytes that come in pieces, "sha256:…" or "crc32:…".

    Raises:
        ValueError: if the algorithm is neither.
    """
    if algorithm == "crc32":
        value = 0
        for buffer in buffers:
            value = crc32(buffer, value)
        return f"crc32:{value:08x}"
    if algorithm != "sha256":
        raise ValueError(f"a digest is one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    running = hashlib.sha256()
    for buffer in buffers:
        running.update(buffer)
    return f"sha256:{running.hexdigest()}"


@dataclass(frozen=True)
class ManifestEntry:
    """What a manifest says of a part.

    Args:
        size: its bytes.
        digest: as `digest` writes it.
    """

    size: int
    digest: str

    @classmethod
    def of(cls, data: bytes | memoryview, algorithm: str = "sha256") -> ManifestEntry:
        """The entry of a part with these bytes."""
        return cls(memoryview(data).nbytes, digest([data], algorithm))

    def check(self, name: str, data: bytes | memoryview) -> None:
        """Hold a part against its entry.

        Raises:
            PartDamaged: if it is not the part that was written.
        """
        size = memoryview(data).nbytes
        if size != self.size:
            raise PartDamaged(f"{name} has {size:,} bytes, and the manifest says {self.size:,}")
        found = digest([data], self.digest.partition(":")[0])
        if found != self.digest:
            raise PartDamaged(f"{name} has the digest {found}, and the manifest says {self.digest}")


@dataclass(frozen=True)
class Manifest:
    """The parts of one snapshot or checkpoint.

    Args:
        number: which one: records or steps that it covers, 0 or more.
        parts: name → entry.
        notes: what else a reader must know, such as a layout; anything that JSON can say.

    Raises:
        ValueError: if the number is negative.
    """

    number: int
    parts: Mapping[str, ManifestEntry]
    notes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"a manifest's number is 0 or more, got {self.number}")

    def packed(self) -> bytes:
        """As bytes: a line of JSON, and a line with its digest."""
        parts = {name: [entry.size, entry.digest] for name, entry in self.parts.items()}
        said = {"format": FORMAT, "number": self.number, "parts": parts, "notes": dict(self.notes)}
        line = json.dumps(said, sort_keys=True).encode() + b"\n"
        return line + digest([line]).encode() + b"\n"

    @classmethod
    def unpacked(cls, data: bytes, name: str = "the manifest") -> Manifest:
        """Read what `packed` wrote.

        Args:
            data: all bytes of the file.
            name: of the file, for messages.

        Raises:
            ManifestDamaged: if it is not whole.
            UnknownFormat: if it is whole and of another version, or no manifest at all.
        """
        line, newline, rest = data.partition(b"\n")
        if not newline or rest != digest([line + newline]).encode() + b"\n":
            raise ManifestDamaged(f"{name} ({len(data):,} bytes) does not agree with its digest: it is torn or changed")
        said = json.loads(line)
        found = said.get("format") if isinstance(said, dict) else None
        if found != FORMAT:
            raise UnknownFormat(f"{name} is of the format {found!r}, and this program reads {FORMAT!r}")
        parts = {part: ManifestEntry(size, value) for part, (size, value) in said["parts"].items()}
        return cls(said["number"], parts, said["notes"])

    def check(self, parts: Mapping[str, bytes | memoryview]) -> None:
        """Hold all parts against their entries.

        Raises:
            PartDamaged: for the first that is missing or differs.
        """
        for name, entry in self.parts.items():
            if name not in parts:
                raise PartDamaged(f"{name} is missing, and the manifest says {entry.size:,} bytes")
            entry.check(name, parts[name])
