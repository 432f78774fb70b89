"""An engine on ranks, as the process sees it that started them: the same calls, carried to rank 0 and back.

    LLM ─ EngineOnRanks ══ socket ══ rank 0: LeadingEngine ── shared memory ── rank 1: follow

The ranks live as long as the object. A rank that dies ends the others, and whoever waits for an answer is told why.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Row
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from minilib.mechanisms.basics.interrupts import held
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.parallel.tensor_parallel.layout import cuts
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.serving.request import InvalidRequest, SamplingParams, SchedulingParams, TokenOutput
from minilib.serving.tensor_parallel.ranks import LeadingEngine, dismiss, follow


class RanksGone(RuntimeError):
    """The ranks of an engine have ended; the message says why."""


class EngineOnRanks:
    """Starts ranks that share a model, and passes requests on to the engine on rank 0.

    Args:
        config: of the model.
        make_model: called on every rank; gives the whole decoder, of which each rank keeps its part.
        world_size: ranks, on this machine.
        timeout: seconds that a rank waits for another one before it takes that for lost.
        options: of `LeadingEngine`; they travel to rank 0.

    Attributes:
        close: ends the ranks; so does the end of this object, or of this process.

    Raises:
        CannotBeCut: for a mixture of experts.
        DoesNotDivide: if a rank cannot have as many heads, or columns of the feed-forward layer, as every other.
        ValueError, TypeError, MemoryError: as `LeadingEngine`.
        RanksGone: if a rank dies or raises before rank 0 makes its engine.

    Cost: two messages a call; the ranks' starts, and one whole model on each rank until it is cut.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_model: Callable[[], Decoder],
        world_size: int,
        *,
        timeout: float = 60.0,
        **options,
    ) -> None:
        cuts(config, {}, world_size)  # refused here, before anything is started
        self._requests: list[str] = []
        self._made: list[TokenOutput] = []  # of a step that was interrupted
        self._failure: list[BaseException] = []
        self._folder = tempfile.TemporaryDirectory(prefix="minilib-")
        address = str(Path(self._folder.name) / "rank-0")
        self._listener = Listener(address, "AF_UNIX")
        self._ranks = threading.Thread(
            target=_run_ranks,
            args=(self._failure, address, world_size, make_model, options, timeout),
            name="ranks",
            daemon=True,
        )
        self._ranks.start()
        self._connection: Connection = self._listener.accept()
        parts = self._connection, self._listener, self._ranks, self._folder
        self.close = weakref.finalize(self, _close, os.getpid(), *parts)
        self._answer()

    @property
    def requests(self) -> dict[str, None]:
        """Names of the unfinished requests; after `close` there are none."""
        return dict.fromkeys(self._requests if self.close.alive else ())

    @property
    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self.requests or self._made)

    @property
    def unseen(self) -> set[str]:
        """See `Engine.unseen`."""
        return {output.request_id for output in self._made}

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Row[int],
        params: SamplingParams | None = None,
        scheduling: SchedulingParams | None = None,
    ) -> None:
        """See `Engine.add_request`."""
        if request_id in self.unseen:
            raise InvalidRequest(f"request {request_id!r} is being served already; choose another id")
        self._call("add_request", request_id, prompt_token_ids, params, scheduling)

    def abort(self, request_id: str) -> bool:
        """See `Engine.abort`."""
        with held():
            known = self._ask("abort", request_id)
            unseen = request_id in self.unseen
            self._made = [output for output in self._made if output.request_id != request_id]
        return known or unseen

    def step(self) -> list[TokenOutput]:
        """See `Engine.step`; an interrupt comes out when the step is done, and the next one returns its tokens.

        Raises:
            RanksGone: if a rank has died or raised, from every call after that, too.
        """
        if not self._made:
            with held():
                self._made = self._ask("step")
        outputs, self._made = self._made, []
        return outputs

    def check_invariants(self) -> None:
        """See `Engine.check_invariants`; of rank 0."""
        self._call("check_invariants")

    def _call(self, name: str, *args):
        with held():
            return self._ask(name, *args)

    def _ask(self, name: str, *args):
        """Call it with interrupts held: an answer that nobody reads would be taken for the next one."""
        try:
            self._connection.send_bytes(pickle.dumps((name, args)))
        except OSError:
            self._gone()
        return self._answer()

    def _answer(self):
        try:
            result, error, self._requests = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._gone()
        if error is not None:
            raise error
        return result

    def _gone(self) -> None:
        self._ranks.join()
        why = self._failure[0] if self._failure else "they were closed"
        raise RanksGone(f"the ranks that serve this model have ended: {why}")


def _run_ranks(failure: list[BaseException], address: str, world_size: int, *args) -> None:
    """In a thread: what ends the ranks, if anything but `close` does, goes into `failure`."""
    try:
        launch.run(_serve, world_size, address, *args)
    except BaseException as error:
        failure.append(error)
    finally:
        with suppress(OSError):  # so that nobody waits for rank 0, if it has not come
            Client(address).close()


def _close(owner: int, connection: Connection, listener: Listener, ranks: threading.Thread, folder) -> None:
    if os.getpid() != owner:
        return  # a copy in a forked process, which has started no ranks
    with suppress(OSError), socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.shutdown(socket.SHUT_RDWR)  # rank 0 hears of it even if a forked process has this end, too
    connection.close()
    ranks.join()
    listener.close()
    folder.cleanup()


def _serve(address: str, make_model: Callable[[], Decoder], options: dict, timeout: float) -> None:
    """What a rank does."""
    comm = Communicator(SharedMemoryTransport(timeout=timeout))
    model = make_model()
    TensorParallel(model, comm)
    if comm.rank:
        follow(model, comm)
        return
    with Client(address) as connection:
        try:
            engine = LeadingEngine(model, comm, **options)
        except Exception as error:
            dismiss(comm)
            connection.send_bytes(pickle.dumps((None, error, [])))
            return
        connection.send_bytes(pickle.dumps((None, None, [])))
        with suppress(EOFError, ConnectionError):  # the process that asks has closed its end
            answer_calls(engine, connection, timeout / 3)
        dismiss(comm)


def answer_calls(engine: LeadingEngine, connection: Connection, patience: float) -> None:
    """Answer calls of an engine on rank 0, until the other end is closed.

    Args:
        engine: what is called.
        connection: to the process that calls.
        patience: seconds without a call after which the other ranks are told to keep waiting.
    """
    while True:
        while not connection.poll(patience):
            engine.keep_waiting()
        name, args = pickle.loads(connection.recv_bytes())
        result, error = None, None
        try:
            result = getattr(engine, name)(*args)
        except Exception as caught:
            if name == "step":  # the other ranks are within it
                raise
            error = caught
        connection.send_bytes(pickle.dumps((result, error, list(engine.requests))))
