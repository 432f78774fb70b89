"""Data parallelism: every rank has the whole model, takes its share of a batch, and averages gradients with the rest.

    dp = DataParallel(model, comm)                   all ranks start with the weights of rank 0
    loss.backward()
    dp.finish()                                      every .grad is now the average, the same bits on all ranks
    optimizer.step()

    method     backward ─────────────────────────▶   finish
    "naive"    layer 3   layer 2   layer 1           ▒ ▒ ▒ ▒ ▒ ▒   an all-reduce for each parameter
    "flat"     layer 3   layer 2   layer 1           ▒▒▒▒▒▒▒▒▒     one for everything
    "buckets"  layer 3   layer 2   layer 1
                         ▒▒▒▒▒▒▒   ▒▒▒▒▒▒▒           ▒▒▒▒▒▒▒       one for each bucket as soon as it is full

In production: torch's DistributedDataParallel, which puts parameters into buckets in the order of the first backward.
Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from minilib.parallel.data.buckets import Bucket, allocate, cut
from minilib.ranks.agreement import same_shapes, same_values
from minilib.ranks.collectives import Communicator, Pending

METHODS = ("naive", "flat", "buckets")
BUCKET_BYTES = 8 * 2**20  # larger ones start later, smaller ones wake threads more often


class NoBackward(RuntimeError):
    """There is nothing to average: no gradient has come since the last `finish`."""


class NotFinished(RuntimeError):
    """A backward came over gradients that are already on their way."""


class Event(NamedTuple):
    """When something happened on this rank.

    Args:
        what: such as "bucket ready", "all-reduce begin", "all-reduce end".
        bucket: which bucket's number, None where it is no bucket's.
        seconds: by time.perf_counter, which ranks of one host share.
    """

    what: str
    bucket: int | None
    seconds: float


class DataParallel:
    """Averages a model's gradients over ranks. The model itself is called, and its optimizer used, as without it.

    Parameters without a gradient count as gradients of zero, on this rank or on all; frozen ones are left out.

    Args:
        model: its parameters and buffers become those of rank 0. Parameters must not be added or unfrozen later.
        comm: between the ranks that share each batch.
        method: one of METHODS.
        bucket_bytes: a bucket is full when it has as many bytes, or more.
        sync_buffers: make buffers, such as BatchNorm's statistics, those of rank 0 again in every `finish`.
        check_every: steps between two calls of `check_in_sync`; never if 0.
        trace: record `events`.
        skip: parameters that each rank has its own of, such as experts; they are left alone.

    Attributes:
        buckets: in the order in which backward fills them.
        events: what happened when, if tracing; clear it when you like.

    Raises:
        RanksDiffer: if ranks have built different models.
        ValueError: for another method, or a model with nothing to train.

    Cost: a step sends 2·(n-1)/n bytes for each byte of gradients, in 2·(n-1) messages a bucket (small buckets fewer);
    memory for one more copy of the gradients until backward frees its own.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        method: str = "buckets",
        *,
        bucket_bytes: int = BUCKET_BYTES,
        sync_buffers: bool = False,
        check_every: int = 0,
        trace: bool = False,
        skip: Collection[nn.Parameter] = frozenset(),
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}")
        self.model, self.comm, self.method = model, comm, method
        self.sync_buffers, self.check_every = sync_buffers, check_every
        self.events: list[Event] = []
        self._skip = frozenset(skip)
        same_shapes(model, comm)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor not in self._skip:
                comm.broadcast(tensor)
        limit = {"naive": 0, "flat": math.inf, "buckets": bucket_bytes}[method]
        self.buckets = allocate(cut(_in_backward_order(model, self._skip), limit), comm)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket, index))
            for bucket in self.buckets
            for index, parameter in enumerate(bucket.parameters)
        ]
        self._watch = ThreadPoolExecutor(1, "watch") if trace else None
        self._steps, self._started, self._syncing, self._due = 0, 0, True, False

    @property
    def due(self) -> bool:
        """Whether gradients have come that `finish` has not averaged yet."""
        return self._due

    def finish(self) -> None:
        """Call after backward: when it returns, every .grad is the average over ranks.

        Raises:
            NoBackward: if there was none, and `weight` was not told that this rank has no tokens.
            CollectiveFailed: if another rank is lost, hangs or does something else.
            OutOfSync: see `check_in_sync`.
        """
        if not self._due:
            raise NoBackward("finish() averages what backward() left: call loss.backward() first, or weight(0)")
        self.mark("backward end")
        for number in range(self._started, len(self.buckets)):
            self._start(number)
        for bucket in self.buckets:
            if bucket.pending is not None:
                bucket.pending.wait()
            bucket.reset()
        if self._watch is not None:
            self._watch.submit(int).result()  # after all that it watches
        self._started, self._due, self._steps = 0, False, self._steps + 1
        if self.sync_buffers:
            for buffer in self.model.buffers():
                self.comm.broadcast(buffer)
        if self.check_every and self._steps % self.check_every == 0:
            self.check_in_sync()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A backward in this context only adds to .grad; the next one outside, or `finish`, averages the sum."""
        self._syncing, before = False, self._syncing
        try:
            yield
        finally:
            self._syncing = before

    def weight(self, num_tokens: int, total: int | None = None) -> float:
        """What to multiply this rank's mean loss by, so that the average over ranks is the mean over all tokens.

        Without it a token counts for more on a rank with few of them. A rank with none skips backward.

        Args:
            num_tokens: that this rank's loss is the mean of.
            total: of all ranks, or of all backwards between two `finish`; if left out, ranks add theirs up now.
        """
        if total is None:
            counted = torch.tensor([num_tokens], device=self.comm.device)
            self.comm.all_reduce(counted)
            total = int(counted)
        if not num_tokens:
            self._due = True
            return 0.0
        return num_tokens * self.comm.world_size / total

    def check_in_sync(self) -> None:
        """Make sure that all ranks have the same parameters, bit for bit. A collective.

        Raises:
            OutOfSync: if not; it says which rank and which parameters.
        """
        same_values(self.model, self.comm, self._skip)

    def mark(self, what: str, bucket: int | None = None) -> None:
        """Record an event now, if tracing; "backward begin" is the caller's to mark."""
        if self._watch is not None:
            self.events.append(Event(what, bucket, time.perf_counter()))

    def close(self) -> None:
        """Let go of the model, for instance to wrap it anew; the communicator stays open."""
        for hook in self._hooks:
            hook.remove()
        if self._watch is not None:
            self._watch.shutdown()

    def check_invariants(self) -> None:
        """Every parameter that is trained is in one bucket, and nothing is on its way between steps."""
        trained = _in_backward_order(self.model, self._skip)
        held = [p for bucket in self.buckets for p in bucket.parameters]
        assert len(held) == len(trained) and set(held) == set(trained), "a parameter is in no bucket, or in two"
        for bucket in self.buckets:
            assert bucket.flat.numel() == sum(p.numel() for p in bucket.parameters), "a bucket of another size"
            assert {p.dtype for p in bucket.parameters} == {bucket.flat.dtype}, "a bucket of several dtypes"
            if not self._due:
                assert bucket.pending is None and len(bucket.missing) == len(bucket.parameters), "something on its way"

    def _arrived(self, bucket: Bucket, index: int, parameter: nn.Parameter) -> None:
        """Autograd has added to a parameter's gradient for the last time in this backward."""
        if index not in bucket.missing:
            raise NotFinished(
                "a gradient came for a second time: call finish() after each backward, "
                "and keep all but the last of several within no_sync()"
            )
        self._due = True
        if not self._syncing or self.method != "buckets":
            return
        bucket.collect(index, 1 / self.comm.world_size)
        # In one order on all ranks, whatever order gradients come in, or some not at all.
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            self._start(self._started)

    def _start(self, number: int) -> None:
        """Begin a bucket's all-reduce, with zeros or what `no_sync` left for gradients that have not come."""
        bucket = self.buckets[number]
        for index in sorted(bucket.missing):
            bucket.collect(index, 1 / self.comm.world_size)
        self._started = number + 1
        self.mark("bucket ready", number)
        if self.method == "buckets":
            bucket.pending = self.comm.all_reduce(bucket.flat, async_op=True)
            if self._watch is not None:
                self._watch.submit(self._see_through, number, bucket.pending, time.perf_counter())
        else:
            self.mark("all-reduce begin", number)
            self.comm.all_reduce(bucket.flat)
            self.mark("all-reduce end", number)

    def _see_through(self, number: int, pending: Pending, asked: float) -> None:
        """Record when an all-reduce in the background began, which is after the one before it, and ended."""
        ends = [event.seconds for event in self.events if event.what == "all-reduce end"]
        pending.wait()
        self.events.append(Event("all-reduce begin", number, max([asked, *ends[-1:]])))
        self.mark("all-reduce end", number)


def _in_backward_order(model: nn.Module, skip: Collection[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters to train, those that the forward uses last first, as far as the order of registration tells."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in skip]
    if not trained:
        raise ValueError("this model has no parameter to train: all are frozen, or there is none")
    return trained[::-1]
