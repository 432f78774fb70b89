"""What somebody does to a packed model or to an engine that serves it is done right or refused, and never by half."""

import copy

import pytest
import torch
from torch import nn

from minilib.serving.cpu.packing import PackedMatrix, PackedModel, pack
from minilib.serving.engine import Engine
from tests.serving.cpu.test_steps import decoder, serve

UNTIED = {"tie_embeddings": False}


def test_an_engine_that_is_copied_after_it_served_makes_the_same_tokens():
    engine = Engine(decoder(), pack=True)
    expected = serve(engine)
    twin = copy.deepcopy(engine)
    assert twin.steps.recorded == {} and serve(twin) == expected
    del engine
    assert serve(twin) == expected


@pytest.mark.parametrize("options", [{}, UNTIED])
def test_a_move_that_is_refused_moves_nothing(options):
    engine = Engine(decoder(**options), pack=True)
    expected = serve(engine)
    with pytest.raises(PackedModel, match="move the model, then pack it"):
        engine.model.half()
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.float32}
    assert serve(engine) == expected


def test_a_step_is_recorded_anew_when_a_norm_has_moved():
    engine = Engine(decoder(), pack=True)
    expected = serve(engine)
    engine.model.share_memory()
    assert serve(engine) == expected
    for layer in engine.model.layers:
        layer.attention_norm.weight = nn.Parameter(layer.attention_norm.weight.detach().clone())
    assert serve(engine) == expected
    with torch.no_grad():
        engine.model.norm.weight.neg_()
    assert serve(engine) != expected, "a weight that is updated in place is served as it is"


def test_weights_are_not_loaded_over_packed_ones():
    weights = decoder(**UNTIED).state_dict()
    model = pack(decoder(**UNTIED))
    for strict in (True, False):
        with pytest.raises(PackedModel, match="load the weights, then pack"):
            model.load_state_dict(weights, strict=strict)


def test_rows_of_another_width_or_dtype_and_ids_that_are_not_there_are_refused():
    matrix = PackedMatrix(torch.randn(61, 64))
    for x in (torch.randn(3, 8), torch.randn(3, 64, dtype=torch.float64)):
        with pytest.raises(ValueError, match="rows of 64 fp32 numbers expected"):
            matrix.product(x)
    for number in (-1, 61, 63):
        with pytest.raises(IndexError, match="rows 0 … 60"):
            matrix.rows(torch.tensor([0, number]))
    model, tokens = pack(decoder()), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="flat tokens"):
        model(tokens, tokens, lambda layer, q, k, v: q)


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_on_as_many_threads_as_torch(threads):
    import numba

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        serve(Engine(decoder(), pack=True))
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)
