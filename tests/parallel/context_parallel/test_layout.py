"""Who has which tokens and what its queries see: every visible pair once, as many on every rank, documents apart."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilib.parallel.context_parallel import LengthDoesNotDivide, TokenLayout
from minilib.parallel.context_parallel.layout import positions_in


def seen(layout: TokenLayout, documents=None, causal=True, rows: int = 1) -> torch.Tensor:
    """How often each query sees each key, in places of the row: (rows, tokens, tokens)."""
    count = torch.zeros(rows, layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for rank, source in itertools.product(range(layout.world_size), repeat=2):
        mine, theirs = layout.places(rank), layout.places(source)
        for row, queries, keys, triangle in layout.tiles(rank, source, documents, causal):
            q, k = mine[queries], theirs[keys]
            visible = torch.ones(len(q), len(k), dtype=torch.int64)
            for r in range(rows)[row]:
                count[r][q[:, None], k] += visible.tril() if triangle else visible
    return count


def mask(num_tokens: int, starts, causal: bool) -> torch.Tensor:
    document = torch.bucketize(torch.arange(num_tokens), torch.tensor(starts[1:]), right=True)
    visible = document[:, None] == document
    return (visible.tril() if causal else visible).long()


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_every_visible_pair_once(ranks, size, balanced, causal, data):
    layout = TokenLayout(ranks * (2 if balanced else 1) * size, ranks, balanced)
    inside = st.lists(st.integers(1, layout.num_tokens), max_size=5) if layout.num_tokens > 1 else st.just([])
    documents = [sorted({0, layout.num_tokens, *data.draw(inside)}) for _ in range(2)]
    expected = torch.stack([mask(layout.num_tokens, starts, causal) for starts in documents])
    assert torch.equal(seen(layout, documents, causal, rows=2), expected)
    assert torch.equal(seen(layout, None, causal)[0], mask(layout.num_tokens, [0, layout.num_tokens], causal))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_head_and_tail_are_even_in_every_round_and_runs_are_not(ranks):
    tokens = 2 * ranks * 3

    def pairs(layout, rank, step):
        return sum(tile.pairs for tile in layout.tiles(rank, (rank - step) % ranks))

    even, uneven = TokenLayout(tokens, ranks), TokenLayout(tokens, ranks, balanced=False)
    for step in range(ranks):
        assert len({pairs(even, rank, step) for rank in range(ranks)}) == 1
    loads = [[sum(pairs(layout, rank, s) for s in range(ranks)) for rank in range(ranks)] for layout in (even, uneven)]
    assert sum(loads[0]) == sum(loads[1]) == tokens * (tokens + 1) // 2
    own = tokens // ranks
    assert loads[1][-1] - loads[1][0] == own * own * (ranks - 1)  # the last rank sees all earlier tokens, too


def test_the_layout_is_torchs_head_tail_balance():
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

    for ranks, tokens in ((2, 8), (4, 24)):
        order = _HeadTailLoadBalancer(tokens, ranks, "cpu")._generate_indices(restore=False)
        assert TokenLayout(tokens, ranks).order().tolist() == order.flatten().tolist()


@pytest.mark.parametrize(("tokens", "ranks", "balanced"), [(10, 4, True), (12, 4, True), (6, 4, False), (0, 2, True)])
def test_lengths_that_do_not_divide(tokens, ranks, balanced):
    """12 tokens on 4 ranks: torch then leaves the balance away without a word, here it is an error."""
    with pytest.raises(LengthDoesNotDivide, match=f"{tokens} tokens cannot be dealt to {ranks} ranks.* multiple of"):
        TokenLayout(tokens, ranks, balanced)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[0, 8]], "one list for each of 2 rows, got 1"),
        ([[0, 8], [0, 7]], r"documents\[1\] must climb from 0 to the 8"),
        ([[0, 8], [1, 8]], r"documents\[1\]"),
        ([[0, 3, 3, 8], [0, 8]], r"documents\[0\]"),
        ([[0, 5, 3, 8], [0, 8]], r"documents\[0\]"),
        ([[], [0, 8]], r"documents\[0\]"),
    ],
)
def test_documents_that_do_not_cover_a_row(documents, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(8, 2).check_documents(documents, 2)


def test_positions_begin_again_in_each_document():
    assert positions_in([[0, 3, 5], [0, 5]], 2, 5).tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert positions_in(None, 2, 3).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("tokens", "ranks"), [(8, 0), (8, -1), (8, 2.0), (8, True), (8, math.nan), (8.0, 2), (math.nan, 2), ("8", 2)]
)
def test_numbers_of_tokens_and_ranks_that_are_none(tokens, ranks):
    with pytest.raises(LengthDoesNotDivide, match="is a whole number ≥ [01], got"):
        TokenLayout(tokens, ranks)


@pytest.mark.parametrize("rank", [2, -1, 0.0, math.nan, True, None])
def test_ranks_that_have_no_tokens(rank):
    layout = TokenLayout(8, 2)
    for call in (layout.chunks, layout.places, lambda rank: layout.tiles(rank, 0), lambda rank: layout.tiles(0, rank)):
        with pytest.raises(IndexError, match=r"is none of the 2 ranks"):
            call(rank)


@pytest.mark.parametrize("documents", [[[0, 4.0, 8]], [[0, math.nan, 8]], [[0, True, 8]], [5], 5, [["0", "8"]], [[0]]])
def test_documents_that_are_none(documents):
    with pytest.raises(ValueError, match="documents"):
        TokenLayout(8, 2).check_documents(documents, 1)
    with pytest.raises(ValueError, match="documents"):
        positions_in(documents, 1, 8)


def test_documents_may_be_tensors_and_rows_may_be_none():
    starts = torch.tensor([[0, 3, 8], [0, 2, 8]])
    TokenLayout(8, 2).check_documents(starts, 2)
    assert torch.equal(positions_in(starts, 2, 8), positions_in(starts.tolist(), 2, 8))
    assert positions_in([], 0, 5).shape == positions_in(None, 0, 5).shape == (0, 5)
