"""Where replicas are: a list that stays, a file that is read again and again, or all addresses of a name in DNS.

What cannot be read says nothing: whoever watches keeps the replicas that are known. A file that is empty says none.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

Discover = Callable[[], Awaitable[list["ReplicaAddress"]]]


class ReplicaAddress(NamedTuple):
    """Where a replica listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> ReplicaAddress:
        """The address in a URL such as http://127.0.0.1:8000.

        Raises:
            ValueError: if it is another one.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"a replica is http://host:port, without a path, got {url!r}")
        return cls(parts.hostname, parts.port or 80)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def in_list(urls: Iterable[str]) -> Discover:
    """These replicas, for ever.

    Raises:
        ValueError: if a URL is none of a replica.
    """
    addresses = list(dict.fromkeys(map(ReplicaAddress.of, urls)))

    async def discover() -> list[ReplicaAddress]:
        return addresses

    return discover


def in_file(path: Path | str) -> Discover:
    """A URL a line; empty lines and those that begin with # are left out. To be replaced as a whole (rename)."""

    async def discover() -> list[ReplicaAddress]:
        lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
        return list(dict.fromkeys(ReplicaAddress.of(line) for line in lines if line and not line.startswith("#")))

    return discover


def in_dns(name: str, port: int) -> Discover:
    """All addresses of a name, such as those of a headless service of Kubernetes."""

    async def discover() -> list[ReplicaAddress]:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
        return sorted({ReplicaAddress(address[0], port) for *_, address in found})

    return discover
