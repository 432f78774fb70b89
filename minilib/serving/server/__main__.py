"""python -m minilib.serving.server: a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from minilib.model import tokenizer
from minilib.model.stored.files import PRETRAINED
from minilib.serving.engine_process.checkpoint_engine import CheckpointEngine
from minilib.serving.engine_process.remote_engine import RemoteEngine
from minilib.serving.server.limits import Limits
from minilib.serving.server.openai_api.templates import ChatTemplate
from minilib.serving.server.serve import DrainingServer
from minilib.serving.server.service import Service

LAST_PORT = 65535
KEY = "MINILIB_API_KEY"  # variable of the environment, which other users of the machine do not see in its process list


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    shown = argparse.ArgumentDefaultsHelpFormatter
    found = argparse.ArgumentParser("python -m minilib.serving.server", description=__doc__, formatter_class=shown)
    add, limits = found.add_argument, Limits()
    add("--model", type=Path, default=PRETRAINED, help="folder of the checkpoint")
    add("--served-model-name", help="what clients call it; the folder's name if left out")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on, 0 for a free one")
    add("--name", help="of this replica, sent with every response as x-replica")
    add("--api-key", default=None, help=f"what clients must send; {KEY} in the environment if left out")
    add("--in-process", action="store_true", help="run the engine in a thread instead of a process of its own")
    add("--max-waiting", type=int, default=1024, help="requests that may wait before the server answers 429")
    add("--max-model-len", type=int, help="most tokens of a prompt and its continuation")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"), help="of the weights")
    add("--num-threads", type=int, help="that compute")
    add("--num-pages", type=int, help="pages of the KV cache")
    add("--page-size", type=int, default=16, help="tokens in a page")
    add("--max-batch-tokens", type=int, default=2048, help="most tokens in a step")
    add("--max-sequences", type=int, default=256, help="most sequences that run at once")
    add("--policy", default="fcfs", help="who is served first")
    add("--prefix-cache", choices=("hash", "radix"), help="keep pages for prompts that begin alike")
    add("--drain-seconds", type=float, default=60, help="for requests to finish after SIGTERM")
    add("--request-seconds", type=float, default=limits.request_seconds, help="most time of a request")
    add("--slow-client-seconds", type=float, default=limits.slow_client_seconds, help="that a client may not read")
    add("--keep-alive-seconds", type=int, default=limits.keep_alive_seconds, help="of a connection that is idle")
    add("--max-body-bytes", type=int, default=limits.body_bytes, help="most bytes of a request's body")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return found


def server_of(given: argparse.Namespace) -> DrainingServer:
    """The server that a command line describes, with its engine; it neither listens nor has loaded anything yet, but
    for an engine in this process.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: if something that it names makes no sense or is not there.
    """
    _check(given)
    limits = Limits(
        body_bytes=given.max_body_bytes,
        request_seconds=given.request_seconds,
        slow_client_seconds=given.slow_client_seconds,
        keep_alive_seconds=given.keep_alive_seconds,
    )
    names = ("num_pages", "page_size", "max_batch_tokens", "max_sequences", "policy", "prefix_cache")
    options = {name: getattr(given, name) for name in names}
    texts, template = tokenizer.load(given.model), ChatTemplate.load(given.model)
    make_engine = CheckpointEngine(given.model, given.dtype, given.num_threads, options)
    if given.in_process:
        from minilib.serving.asynchronous.async_engine import AsyncEngine  # and torch, which no other server loads

        engine, start = AsyncEngine(make_engine(), given.max_waiting), None
    else:
        engine = RemoteEngine(make_engine, given.max_waiting)
        start = engine.start
    model = given.served_model_name or given.model.resolve().name
    service = Service(engine, model, texts, template, limits, given.name, given.max_model_len)
    key = given.api_key or os.environ.get(KEY)
    return DrainingServer(service, given.host, given.port, key, given.drain_seconds, start)


def _check(given: argparse.Namespace) -> None:
    """Refuse what would be found out late, or never: a port above the last one is taken modulo 65,536."""
    if not given.model.is_dir():
        raise ValueError(f"--model is the folder of a checkpoint, got {given.model}, and there is no such folder")
    if not 0 <= given.port <= LAST_PORT:
        raise ValueError(f"--port is 0 for a free one, or up to {LAST_PORT}, got {given.port}")
    for name, value in (("--max-model-len", given.max_model_len), ("--num-threads", given.num_threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")
    if not given.drain_seconds >= 0:
        raise ValueError(f"--drain-seconds is 0 or more, got {given.drain_seconds:g}")
    if given.name is not None and not (given.name.isascii() and given.name.isprintable() and given.name.strip()):
        raise ValueError(f"--name becomes a header: printable ASCII that is not blank, got {given.name!r}")


def serve_from(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes; 0 if all went well."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=given.log_level.upper(), format="%(message)s", stream=sys.stderr)
    try:
        server = server_of(given)
    except (ValueError, OSError) as error:
        logging.error("%s", error)
        return 2
    server.run()
    if server.failure is not None:
        logging.error("the engine did not start: %s", server.failure)
        return 1
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(serve_from())
