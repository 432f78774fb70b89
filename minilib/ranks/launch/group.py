"""What a rank does, whether `run` or torchrun started it: join the process group, return a value, report a failure."""

from __future__ import annotations

import datetime
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

from minilib.ranks.launch.errors import RankFailed, ReturnNotPicklable
from minilib.ranks.launch.pickling import dumps

running: ContextVar[int | None] = ContextVar("the rank whose function is running", default=None)


def join(backend: str, timeout: float, **place) -> None:
    """Initialise torch.distributed in this process.

    Args:
        backend: "gloo" or "nccl"; the latter takes the GPU numbered LOCAL_RANK.
        timeout: seconds that one collective may take.
        place: store, rank and world_size; without them, what the environment says.
    """
    import torch
    import torch.distributed as dist

    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        stay_on_loopback()
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), **place)


def place_of_attempt(timeout: float) -> dict:
    """Where the ranks of this attempt meet under torchrun on one host; nothing if ranks are on several.

    torchrun's store outlives its restarts, with all that dead ranks have written into it: a rank would read the address
    of a peer of the attempt before. On several hosts torchrun counts restarts on each host for itself.

    Args:
        timeout: seconds to wait for the store.

    Returns:
        For `join`.
    """
    import torch.distributed as dist

    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    found = dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout))
    store, rank, world_size = next(iter(found))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": world_size}


def leave() -> None:
    """Take this process out of its group, if it is in one: gloo's threads abort a process that ends with them alive."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def stay_on_loopback() -> None:
    """Have gloo listen on the loopback interface, unless the caller has chosen another.

    Gloo would listen where the host's name resolves to: a name that does not resolve, or resolves slowly, or to an
    interface that is down, must not matter to ranks on one host.
    """
    loopback = {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex())
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())


def call(fn: Callable, args: tuple, rank: int, world_size: int) -> bytes:
    """Call `fn(*args)` as the given rank.

    Returns:
        Its value, pickled: a tensor with its contents, an object with its class if a notebook cell defines that.

    Raises:
        ReturnNotPicklable: if the value cannot be pickled.
    """
    token = running.set(rank)
    try:
        result = fn(*args)
    finally:
        running.reset(token)
    try:
        return dumps(result)
    except Exception as error:
        raise ReturnNotPicklable(
            f"rank {rank} of {world_size} returned a {type(result).__name__} that cannot be pickled ({error}): "
            "return plain values and tensors",
            rank,
        ) from error


def returned(pickled: bytes, rank: int, world_size: int) -> object:
    """What `call` returned on the given rank, in this process.

    Raises:
        ReturnNotPicklable: if it cannot be unpickled here.
    """
    try:
        return pickle.loads(pickled)
    except Exception as error:
        message = f"rank {rank} of {world_size} returned a value that cannot be unpickled here: {error!r}"
        raise ReturnNotPicklable(message, rank) from error


def failure(error: BaseException, rank: int, world_size: int) -> RankFailed:
    """The error as every process can read it: its traceback as text, from the function that was called inwards."""
    if isinstance(error, ReturnNotPicklable):
        return error
    frames = error.__traceback__
    while frames is not None and is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    return RankFailed(f"rank {rank} of {world_size} failed:\n{text}", rank)


def is_ours(filename: str) -> bool:
    """Whether the file is one of launch's own, whose frames tell nothing about a function that failed or hangs."""
    return Path(filename).parent == Path(__file__).parent
