"""Counted collectives, bytes and kept activations against the formulas, and products under way beside collectives."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilib.parallel.tensor_parallel import TensorParallel
from minilib.parallel.tensor_parallel.ledger import activation_bytes, stream_collectives, wire_bytes
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.parallel.tensor_parallel.models import SHAPES, STREAMS, config_of, decoder, tokens_of

TOKENS = 21


def counts() -> dict:
    """Of each shape and stream: collectives and bytes of forward, backward and finish."""
    comm, found = Communicator(SharedMemoryTransport()), {}
    for shape, changes in SHAPES.items():
        for number, options in enumerate(STREAMS):
            tp, sent, called = TensorParallel(decoder(0, **changes), comm, **options), {}, {}

            def count(what, call, tp=tp, sent=sent, called=called):
                bytes_before, calls_before = comm.traffic.bytes, tp.stream.collectives.copy()
                result = call()
                sent[what] = comm.traffic.bytes - bytes_before
                called[what] = tp.stream.collectives - calls_before
                return result

            loss = count("forward", partial(tp.model.loss, *tokens_of(0)))
            count("backward", loss.backward)
            count("finish", tp.finish)
            found[shape, number] = {"sent": sent, "called": called}
    return found


@pytest.mark.parametrize("n", [2, 4])
def test_collectives_and_bytes_are_those_of_the_formulas(n):
    ranks = run(counts, n)
    for shape, number in ranks[0]:
        config, options = config_of(**SHAPES[shape]), STREAMS[number]
        of_wire = {name: value for name, value in options.items() if name != "chunks"}
        expected = wire_bytes(config, TOKENS, n, **of_wire, itemsize=8)
        sent = {what: sum(rank[shape, number]["sent"][what] for rank in ranks) for what in expected}
        assert sent == expected, (shape, options)
        layers = config.num_layers
        for rank in ranks:
            called = rank[shape, number]["called"]
            assert sum(called.values(), Counter()) == stream_collectives(config, **options)
            # 2 and 2 a layer; the embedding's in forward, the output's in backward, and halves of these in both.
            if options == {}:
                assert called["forward"] == called["backward"] == {"all_reduce": 2 * layers + 1}
            if options == {"sequence_parallel": True}:
                each = 2 * layers + 1
                assert called["forward"] == called["backward"] == {"all_gather": each, "reduce_scatter": each}


def test_sequence_parallelism_sends_as_many_bytes_where_tokens_divide():
    config = config_of()
    for n in (2, 4, 8):
        whole, split = (wire_bytes(config, 64, n, sequence_parallel) for sequence_parallel in (False, True))
        assert whole["forward"] == split["forward"] and whole["backward"] == split["backward"]


class Kept:
    """Bytes of what autograd keeps for backward, parameters aside."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: dict[int, int] = {}

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self._kept.values())


SPLITS = ({}, {"sequence_parallel": True}, {"sequence_parallel": True, "regather": True})


def keeps() -> list[int]:
    """Bytes that a rank keeps for one layer: of three layers less those of two."""
    comm, found = Communicator(SharedMemoryTransport()), []
    for options in SPLITS:
        kept = []
        for layers in (2, 3):
            model = decoder(0, num_layers=layers)
            TensorParallel(model, comm, **options)
            with Kept(model) as seen:
                loss = model.loss(*tokens_of(0, sequences=3, context=8))
            kept.append(seen.bytes)
            loss.backward()
        found.append(kept[1] - kept[0])
    return found


@pytest.mark.parametrize("n", [1, 2, 4])
def test_activations_are_those_of_the_formula(n):
    for found in run(keeps, n):
        assert found == [activation_bytes(config_of(), 24, n, **options, itemsize=8) for options in SPLITS]
        assert n == 1 or found[0] > found[1] > found[2]


# Overlap


class Watched(Communicator):
    """Writes down when each collective begins and when it is waited for."""

    def __init__(self, log: list) -> None:
        super().__init__(SharedMemoryTransport())
        self.log, self._numbers = log, iter(range(10**6))

    def _submit(self, run, what, async_op):
        number = next(self._numbers)
        self.log.append(("begin", number))
        pending = super()._submit(run, what, async_op)
        if not async_op:
            self.log.append(("end", number))
            return pending
        wait = pending.wait
        pending.wait = lambda: (self.log.append(("end", number)), wait())[1]
        return pending


class Products(TorchDispatchMode):
    """Writes down every matrix product."""

    def __init__(self, log: list) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.log.append(("product", None))
        return func(*args, **(kwargs or {}))


def overlapped(log: list) -> int:
    """Collectives during which a product was computed."""
    ends = {number: place for place, (what, number) in reversed(list(enumerate(log))) if what == "end"}
    begins = {number: place for place, (what, number) in enumerate(log) if what == "begin"}
    return sum(any(what == "product" for what, _ in log[begins[k] : ends[k]]) for k in begins)


def overlaps() -> list[tuple[int, int]]:
    found = []
    for options in STREAMS:
        log: list = []
        tp = TensorParallel(decoder(0), Watched(log), **options)
        with Products(log):
            log.clear()
            loss = tp.model.loss(*tokens_of(0))
            forward = overlapped(log)
            log.clear()
            loss.backward()
        found.append((forward, overlapped(log)))
    return found


def test_products_are_computed_while_collectives_are_under_way():
    layers, chunks = 2, 3
    rows = 2 * layers  # products by rows, whose chunks but the last are summed beside the next product
    columns = 2 * layers + 1  # products by columns, whose gradients are summed beside those of the weights
    assert run(overlaps, 2) == [[
        (0, columns),
        (2 * layers, 4 * layers),  # gathered beside the product of a rank's own tokens; in backward all of a layer
        (rows * (chunks - 1), columns),
        (2 * layers + rows * (chunks - 1), 4 * layers),
        (2 * layers, 6 * layers),  # gathered again beside the gradient of the input
    ]] * 2  # fmt: skip
