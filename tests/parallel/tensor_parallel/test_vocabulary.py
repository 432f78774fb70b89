"""Loss and tables over a cut vocabulary against torch's own, and the parts of a layout against the whole."""

import math

import pytest
import torch
from torch.nn import functional as F

from minilib.mechanisms.sharding.columns import DoesNotDivide
from minilib.parallel.tensor_parallel.layout import cuts
from minilib.parallel.tensor_parallel.linear import Enter, Leave
from minilib.parallel.tensor_parallel.sequence_parallel import SequenceParallel
from minilib.parallel.tensor_parallel.stream import Replicated
from minilib.parallel.tensor_parallel.vocabulary import vocabulary_parallel_cross_entropy
from minilib.ranks.agreement import RanksDiffer
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.parallel.tensor_parallel.models import SHAPES, config_of, decoder

# 5 tokens on 4 ranks: two each, so that the third has one and the last has none
VOCABULARY, LENGTH, RANKS = 5, 2, 4


def logits_of(kind: str) -> torch.Tensor:
    logits = torch.randn(6, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if kind == "large":
        logits *= 1e4  # whose exponentials are no numbers
    if kind == "far apart":
        logits[:, :4] -= 1e4
    if kind == "one is -inf":
        logits[:, 1] = -math.inf
    if kind == "nan":
        logits[2, 3] = math.nan
    if kind == "no tokens":
        logits = logits[:0]
    return logits


KINDS = ("usual", "large", "far apart", "one is -inf", "nan")
TARGETS = torch.tensor([0, 2, 4, 3, 0, 2])
SOME_IGNORED, ALL_IGNORED = TARGETS.index_fill(0, torch.tensor([0, 2, 3]), -100), TARGETS.new_full((6,), -100)
CASES = [(kind, targets) for targets in (TARGETS, SOME_IGNORED) for kind in KINDS]
CASES += [("usual", ALL_IGNORED), ("no tokens", TARGETS[:0])]


def losses() -> list:
    comm = Communicator(SharedMemoryTransport())
    padding = RANKS * LENGTH - VOCABULARY
    found = []
    for kind, targets in CASES:
        padded = F.pad(logits_of(kind), (0, padding), value=1e9)  # would win, if it were asked
        own = padded.split(LENGTH, 1)[comm.rank].clone().requires_grad_()
        loss = vocabulary_parallel_cross_entropy(own, targets, VOCABULARY, comm)
        loss.backward()
        found.append((loss.detach(), own.grad))
    own = logits_of("usual").new_zeros(6, LENGTH)
    one_ignores = TARGETS.clone()
    if comm.rank == 1:
        one_ignores[5] = -100  # rank 1 has token 2, so that nobody does
    others_ignore = ALL_IGNORED if comm.rank else TARGETS
    wrong = [torch.full((6,), bad) for bad in (VOCABULARY, -1, -99)]
    for targets in (*wrong, TARGETS + (comm.rank == 1), one_ignores, others_ignore):
        with pytest.raises(RanksDiffer, match="pass the same tokens on all ranks"):
            vocabulary_parallel_cross_entropy(own, targets, VOCABULARY, comm)
    return found


def enters_and_leaves() -> None:
    """What goes into a sum, in forward or in backward, is not overwritten by it."""
    comm = Communicator(SharedMemoryTransport())
    for stream, rows in ((Replicated(comm), 6), (SequenceParallel(comm), 3)):
        stream.begin(torch.Size((2, 3)))
        x = torch.full((2, 3, 4), comm.rank + 1.0, requires_grad=True)
        y = Leave.apply(x, stream)
        assert y.numel() == rows * 4 and (y == 3).all() and (x == comm.rank + 1).all()
        gradient = torch.full_like(y, 5.0)
        y.backward(gradient)
        assert (x.grad == 5).all() and (gradient == 5).all()
    part = torch.full((3, 4), comm.rank + 1.0, requires_grad=True)
    whole = Enter.apply(part, stream)
    assert whole.flatten(0, 1).tolist() == [[1.0] * 4] * 3 + [[2.0] * 4] * 3
    gradient = torch.full_like(whole, comm.rank + 1.0)
    whole.backward(gradient)
    assert (part.grad == 3).all() and (gradient == comm.rank + 1).all()


def test_sums_leave_what_they_are_made_of_as_it_is():
    run(enters_and_leaves, 2)


def test_a_loss_over_a_cut_vocabulary_is_that_over_the_whole():
    ranks = run(losses, RANKS)
    for number, (kind, targets) in enumerate(CASES):
        logits = logits_of(kind).requires_grad_()
        expected = F.cross_entropy(logits, targets)
        expected.backward()
        gradients = torch.cat([rank[number][1] for rank in ranks], 1)
        assert not gradients[:2, VOCABULARY:].any(), f"{kind}: padding has got probability"
        close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(gradients[:, :VOCABULARY], logits.grad, **close)
        for rank in ranks:
            torch.testing.assert_close(rank[number][0], expected.detach(), **close)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_parts_make_the_whole_and_each_value_has_as_many_ranks_as_is_said(shape, n):
    model = decoder(0, **SHAPES[shape])
    state = model.state_dict()
    for name, cut in cuts(model.config, {name: x.shape for name, x in state.items()}, n).items():
        numbers = torch.arange(1, state[name].numel() + 1).view(state[name].shape)
        parts = [cut.take(numbers, rank) for rank in range(n)]
        assert len({part.shape for part in parts}) == 1
        assert torch.equal(cut.whole(parts), numbers)
        for group, of_ranks in zip(cut.groups, zip(*map(cut.split, parts), strict=True), strict=True):
            seen = torch.cat([part.flatten() for part in of_ranks])
            _, times = seen[seen > 0].unique(return_counts=True)
            assert (times == group.copies).all()


@pytest.mark.parametrize(
    ("changes", "n", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, 4, "6 num_heads cannot be dealt to 4 shards"),
        ({"num_heads": 2}, 4, "2 num_heads cannot be dealt to 4 shards; make it a multiple"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, "3 num_kv_heads cannot .* a multiple or a divisor"),
        ({"intermediate_size": 18}, 4, "18 values of intermediate_size cannot"),
    ],
)
def test_what_does_not_divide_is_refused(changes, n, message):
    config = config_of(**changes)
    with pytest.raises(DoesNotDivide, match=message):
        cuts(config, {}, n)
