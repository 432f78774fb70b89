"""A router from the command line: python -m minilib.serving.router --replica http://127.0.0.1:8001 --replica …"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence

from minilib.classic.http.wire import HOST
from minilib.mechanisms.balancing import BoundedHashing, LeastLoaded, Policy, Random, RoundRobin, Sticky, TwoChoices
from minilib.serving.router.discovery import Discover, in_dns, in_file, in_list
from minilib.serving.router.prefix_aware import BySession, PrefixAware
from minilib.serving.router.router import ReplicaRouter

KEY = "MINILIB_API_KEY"  # variable of the environment with the key of the replicas; checks send it
POLICIES: dict[str, Callable[[argparse.Namespace], Policy]] = {
    "prefix_aware": lambda asked: PrefixAware(asked.blocks, num_routers=asked.routers),
    "sticky": lambda asked: BySession(Sticky),
    "bounded_hashing": lambda asked: BySession(BoundedHashing),
    "two_choices": lambda asked: TwoChoices(0),
    "least_loaded": lambda asked: LeastLoaded(),
    "round_robin": lambda asked: RoundRobin(),
    "random": lambda asked: Random(0),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="python -m minilib.serving.router", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--replica", action="append", help="URL of a replica; may be given several times")
    where.add_argument("--replica-file", help="file with a URL a line, read again before each round of checks")
    where.add_argument("--replica-dns", metavar="NAME:PORT", help="name whose addresses are all replicas")
    parser.add_argument("--policy", choices=POLICIES, default="prefix_aware")
    parser.add_argument("--blocks", type=int, default=2**15, help="blocks that are remembered of each replica")
    parser.add_argument("--routers", type=int, default=1, help="routers before the same replicas")
    parser.add_argument("--fingerprint", help="of the weights that replicas must have; left out: that of most of them")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two rounds of checks")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=8080, help="0 for any free one")
    parser.add_argument("--drain", type=float, default=30.0, help="seconds that requests have after SIGTERM")
    asked = parser.parse_args(arguments)
    try:
        asked.discover, asked.chosen = _discover(asked), POLICIES[asked.policy](asked)
    except ValueError as error:
        parser.error(str(error))
    return asked


async def serve(asked: argparse.Namespace) -> None:
    """Route until SIGTERM or SIGINT, then let requests finish."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    router = ReplicaRouter(
        asked.discover, asked.chosen, fingerprint=asked.fingerprint, every=asked.every, api_key=os.environ.get(KEY)
    )
    port = await router.start(asked.host, asked.port)
    logging.getLogger(__name__).info("routes on http://%s:%d by %s", asked.host, port, asked.policy)
    await stop.wait()
    await router.stop(asked.drain)


def _discover(asked: argparse.Namespace) -> Discover:
    if asked.replica:
        return in_list(asked.replica)
    if asked.replica_file:
        return in_file(asked.replica_file)
    name, _, port = asked.replica_dns.rpartition(":")
    if not name or not port.isdecimal():
        raise ValueError(f"--replica-dns is a name, a colon and a port, got {asked.replica_dns}")
    return in_dns(name, int(port))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    asyncio.run(serve(parse()))
