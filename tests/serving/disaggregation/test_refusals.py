"""Workers that do not fit each other, and options that make no sense, are refused by name before anything moves."""

import dataclasses
import math

import pytest
import torch

from minilib.model.decoder import Decoder
from minilib.serving.disaggregation.channel import ChannelClosed
from minilib.serving.disaggregation.decode import DecodeEngine
from minilib.serving.disaggregation.page_format import PagesRefused
from minilib.serving.disaggregation.prefill import PrefillEngine
from tests.model.random_weights import randomize
from tests.serving.disaggregation.workers import CONFIG, PAGE, channels, model


def other_weights():
    return randomize(Decoder(CONFIG), seed=6, scale=2), PAGE


def other_layers():
    return randomize(Decoder(dataclasses.replace(CONFIG, num_layers=2)), seed=5, scale=2), PAGE


def other_dtype():
    return randomize(Decoder(CONFIG).to(torch.bfloat16), seed=5, scale=2), PAGE


def other_page_size():
    return model(), PAGE * 2


@pytest.mark.parametrize(
    ("make", "what"),
    [(other_weights, "model is"), (other_layers, "num_layers is 3"), (other_dtype, "dtype is"),
     (other_page_size, "page_size is 4 there and 8 here")],
)  # fmt: skip
def test_pages_of_another_kind_are_refused_before_a_byte_moves(make, what):
    with channels() as (near, far):
        prefill = PrefillEngine(model(), 8, PAGE)
        prefill.attach(near)
        decoder, page_size = make()
        with pytest.raises(PagesRefused, match=what):
            DecodeEngine(decoder, [far], 8, page_size)
        prefill.turn()
        assert not prefill.channels and near.content_bytes_sent == near.content_bytes_received == 0


@pytest.mark.parametrize("lease", [0, -1, math.nan])
def test_a_lease_lasts_a_while(lease):
    with pytest.raises(ValueError, match="longer than 0"):
        PrefillEngine(model(), 8, PAGE, lease=lease)


@pytest.mark.parametrize("options", [{"on_failure": "ignore"}, {"timeout": 0}, {"least_tokens": 0}, {"patience": -1}])
def test_options_that_make_no_sense(options):
    with channels() as (_, far), pytest.raises(ValueError, match="on_failure|needed"):
        DecodeEngine(model(), [far], 8, PAGE, **options)


def test_a_worker_that_never_says_hello():
    with channels() as (_, far), pytest.raises(ChannelClosed, match="said nothing for 0.05 s"):
        DecodeEngine(model(), [far], 8, PAGE, timeout=0.05)
