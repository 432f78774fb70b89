"""How a rank's metrics reach Prometheus: over HTTP while it runs, or as a file that node_exporter reads.

    MetricsEndpoint(metrics, targets)   127.0.0.1 on a free port; a file in `targets` tells Prometheus where
    write_textfile(metrics, path)       for a job that may end before anybody scrapes it

A free port is another one after every restart. A target's default label `instance` has the port in it, so all series of
a rank would begin anew and no counter would be seen to grow over a restart. The file of targets gives each rank a
lasting `instance`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self
from urllib.parse import quote

from prometheus_client import generate_latest, start_http_server

from minilib.mechanisms.basics.files import written_whole
from minilib.operations.metrics.rank_metrics import RankMetrics

TEXTFILE = ".prom"


class MetricsEndpoint:
    """Serves a rank's metrics until it is closed, on a thread beside the training loop.

    A loop that hangs in a collective still answers, with an old heartbeat; one that holds the interpreter's lock
    does not, and Prometheus shows it as down.

    Args:
        metrics: of this rank.
        targets: folder of files that Prometheus' file_sd_configs reads; None to tell nobody.
        address: to listen on.
        port: 0 for a free one.

    Attributes:
        port: on which it listens.

    Raises:
        OSError: if the port is taken, or the file cannot be written; then it does not listen.
    """

    def __init__(
        self, metrics: RankMetrics, targets: Path | None = None, address: str = "127.0.0.1", port: int = 0
    ) -> None:
        self._metrics = metrics
        self._server, self._thread = start_http_server(port, address, metrics.registry)
        self.port = self._server.server_port
        self._target = targets and targets / f"{quote(metrics.run, safe='')}-{metrics.rank}.json"
        try:
            self._tell(address)
        except BaseException:
            self._stop_listening()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """A job that ends well takes its target back; one that fails leaves it, and is seen to be down."""
        self.close(ended_well=exception[0] is None)

    @property
    def url(self) -> str:
        """What Prometheus scrapes."""
        return f"http://{self._server.server_address[0]}:{self.port}/metrics"

    def close(self, ended_well: bool = True) -> None:
        """Stop listening."""
        self._metrics.running = False
        if self._target is not None and ended_well:
            self._target.unlink(missing_ok=True)
        self._stop_listening()

    def _tell(self, address: str) -> None:
        if self._target is not None:
            labels = {"instance": f"{self._metrics.run}/{self._metrics.rank}"}
            with written_whole(self._target) as partial:
                partial.write_text(json.dumps([{"targets": [f"{address}:{self.port}"], "labels": labels}]))

    def _stop_listening(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def write_textfile(metrics: RankMetrics, path: Path) -> None:
    """Write a rank's metrics where node_exporter's textfile collector finds them; it reads the old file or the new one.

    Raises:
        ValueError: if the name does not end as the collector expects; others it leaves out.
    """
    if path.suffix != TEXTFILE:
        raise ValueError(f"node_exporter reads files whose name ends in {TEXTFILE}, got {path.name!r}")
    with written_whole(path) as partial:
        partial.write_bytes(generate_latest(metrics.registry))
