"""Refused by name on every rank, out of step, or lost: nobody waits longer than the timeout."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.sharding.columns import DoesNotDivide
from minilib.model import weights
from minilib.model.moe.config import MoEConfig
from minilib.model.stored.files import CheckpointError
from minilib.parallel.tensor_parallel import CannotBeCut, TensorParallel
from minilib.parallel.zero.saving import OtherModel
from minilib.ranks import collectives
from minilib.ranks.agreement import RanksDiffer
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.parallel.tensor_parallel.models import decoder, tokens_of


def refuses(folder: Path) -> None:
    comm = Communicator(SharedMemoryTransport(timeout=5.0))
    odd = comm.rank == 1
    for error, message, changes in (
        (DoesNotDivide, "3 num_heads cannot be dealt to 2 shards", {"num_heads": 3, "num_kv_heads": 1}),
        (DoesNotDivide, "3 num_kv_heads cannot be dealt to 2 shards", {"num_heads": 6, "num_kv_heads": 3}),
        (CannotBeCut, "a mixture of experts", {"moe": MoEConfig(4, 2, 8)}),
        (RanksDiffer, "rank 1 has ModelConfig.*moe=None", {} if odd else {"moe": MoEConfig(4, 2, 8)}),
        (RanksDiffer, "rank 1 has ModelConfig.*num_layers=3", {"num_layers": 3 if odd else 2}),
        # every parameter has the same shape on both
        (RanksDiffer, "rank 1 has ModelConfig.*head_dim=12", {"num_heads": 2, "head_dim": 12} if odd else {}),
    ):
        model = decoder(0, **{"num_kv_heads": 2, **changes} if error is RanksDiffer else changes)
        shapes = [parameter.shape for parameter in model.parameters()]
        with pytest.raises(error, match=message):
            TensorParallel(model, comm)
        assert [parameter.shape for parameter in model.parameters()] == shapes, "refused, and cut all the same"
    for chunks in (0, 1.5, None):
        with pytest.raises(ValueError, match=f"chunks must be a whole number, at least 1, got {chunks}"):
            TensorParallel(decoder(0), comm, chunks=chunks)
    with pytest.raises(ValueError, match="regather is for sequence_parallel"):
        TensorParallel(decoder(0), comm, regather=True)
    frozen = decoder(0)
    frozen.norm.requires_grad_(odd)
    with pytest.raises(RanksDiffer, match="norm.weight"):
        TensorParallel(frozen, comm)
    packed = decoder(0)
    packed.ops.compiled = True
    with pytest.raises(CannotBeCut, match="pack=False"):
        TensorParallel(packed, comm)
    cut_model_refuses(comm, folder)


def cut_model_refuses(comm: Communicator, folder: Path) -> None:
    tp = TensorParallel(decoder(0), comm)
    with pytest.raises(CannotBeCut, match="has been cut already"):
        TensorParallel(tp.model, comm)
    with pytest.raises(CannotBeCut, match="initialized before it is cut"):
        tp.model.initialize(1)
    with pytest.raises(CheckpointError, match="full_state_dict"):
        weights.save(tp.model, folder / "model")
    before = {name: x.clone() for name, x in tp.model.state_dict().items()}
    whole = decoder(1).state_dict()
    for state, message in (
        ({name: x for name, x in whole.items() if name != "norm.weight"}, "norm.weight: .* the state has none"),
        (whole | {"layers.2.norm.weight": whole["norm.weight"]}, "layers.2.norm.weight: the model has no such"),
        (decoder(1, vocab_size=38).state_dict(), r"embed.weight: the model has \(37, 12\), the state has \(38, 12\)"),
    ):
        with pytest.raises(OtherModel, match=message):
            tp.load_full_state_dict(state)
    torch.testing.assert_close(tp.model.state_dict(), before, rtol=0, atol=0)
    tp.load_full_state_dict(whole)
    torch.testing.assert_close(tp.full_state_dict(), whole, rtol=0, atol=0)
    tokens, positions, targets = tokens_of(0)
    for bad in (37, -1):
        with pytest.raises(IndexError, match="token ids are 0 … 36, got"):
            tp.model.loss(torch.where(tokens == tokens[0, 0], bad, tokens), positions, targets)


def test_what_cannot_be_cut_is_refused_on_every_rank(tmp_path):
    run(refuses, 2, tmp_path)


def said(call) -> tuple[str, str, float]:
    """What it raises, and after how many seconds."""
    started = time.monotonic()
    try:
        call()
    except (CollectiveFailed, RanksDiffer, ArithmeticError) as error:
        return type(error).__name__, str(error), time.monotonic() - started
    raise AssertionError("no failure")


def raises(*args):
    raise ArithmeticError("in a layer")


def is_out_of_step(timeout: float) -> list[tuple[str, str, float]]:
    collectives.GRACE = 0.0
    odd, found = dist.get_rank() == 1, []

    def other_shape(tp):
        tp.model.loss(*tokens_of(0, context=6 if odd else 7)).backward()

    def other_targets(tp):
        tokens, positions, targets = tokens_of(0)
        tp.model.loss(tokens, positions, targets.roll(1, 1) if odd else targets)

    def forgets_a_backward(tp):
        loss = tp.model.loss(*tokens_of(0))
        if odd:
            tp.model.loss(*tokens_of(0, sequences=2))
        loss.backward()

    def fails_in_a_layer(tp):
        tp.model.layers[1].feed_forward = raises if odd else tp.model.layers[1].feed_forward
        tp.model.loss(*tokens_of(0))

    def stays_away(tp):
        if odd:
            raise CollectiveFailed("stays away")
        tp.model.loss(*tokens_of(0))

    for wrong in (other_shape, other_targets, forgets_a_backward, fails_in_a_layer, stays_away):
        comm = Communicator(SharedMemoryTransport(timeout=timeout))
        tp = TensorParallel(decoder(comm.rank), comm, sequence_parallel=wrong is forgets_a_backward)
        found.append(said(partial(wrong, tp)))
    dist.barrier()
    return found


def test_a_rank_that_is_out_of_step_leaves_nobody_waiting():
    timeout = 1.0
    shapes, targets, backwards, raised, away = zip(*run(is_out_of_step, 2, timeout), strict=True)
    for found in (shapes, backwards):
        assert "CollectiveMismatch" in {kind for kind, _, _ in found}, found
        assert all("in call" in message for _, message, _ in found), found
    assert {kind for kind, _, _ in targets} == {"RanksDiffer"}, "the same loss of other targets"
    for found, own in ((raised, "in a layer"), (away, "stays away")):
        assert found[0][0] == "CollectiveFailed" and found[1][1] == own, found
    assert all(seconds < 2 * timeout + 5 for found in (shapes, targets, raised, away) for _, _, seconds in found)


def dies(marks: Path) -> None:
    comm = Communicator(SharedMemoryTransport(timeout=30.0))
    tp = TensorParallel(decoder(comm.rank), comm)
    (marks / str(os.getpid())).touch()
    if comm.rank == 1:
        tp.model.layers[1].feed_forward = lambda x: os.kill(os.getpid(), signal.SIGKILL)
    tp.model.loss(*tokens_of(0))


def test_a_rank_that_dies_is_named_and_no_other_is_left_running(tmp_path):
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL"):
        run(dies, 2, tmp_path)
    assert time.monotonic() - started < 20
    processes = [int(mark.name) for mark in tmp_path.iterdir()]
    assert len(processes) == 2 and not any(map(psutil.pid_exists, processes))
