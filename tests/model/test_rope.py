"""Frequencies, and how they are stretched, against transformers; and what config.json may say of them."""

import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minilib.model.config import ModelConfig, UnsupportedModel
from minilib.model.rope import LinearScaling, Llama3Scaling, YarnScaling, inverse_frequencies, rotation
from tests.model import oracle
from tests.model.test_config import LLAMA_4 as LLAMA_31

PLAIN = {name: value for name, value in LLAMA_31.items() if name not in ("rope_scaling", "rope_theta")}
LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = [
    {"rope_type": "linear", "factor": 1.0},
    {"rope_type": "linear", "factor": 3.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 2.0},
    LONG,
    {"rope_type": "yarn", "factor": 1.0},
    {**LONG, "factor": 40},
    {**LONG, "beta_fast": 8, "beta_slow": 2.0},
    {**LONG, "truncate": False},
    {**LONG, "attention_factor": 1.25},
    {**LONG, "mscale": 1.0, "mscale_all_dim": 0.707},
    {**LONG, "mscale": 1.0},
    {**LONG, "original_max_position_embeddings": 4},  # the ramp is cut at both ends
    {**LONG, "beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 7},  # the ramp is one step
]


def read(**changes):
    return ModelConfig.from_hugging_face({**PLAIN, **changes})


@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
@pytest.mark.parametrize("theta", [500.0, 1_000_000])
@pytest.mark.parametrize("rope", SCALINGS, ids=str)
def test_frequencies_and_attention_factor_are_those_of_transformers(rope, theta, head_dim):
    sizes = {"head_dim": head_dim, "max_position_embeddings": 65536}
    theirs = LlamaConfig(**sizes, rope_parameters={**rope, "rope_theta": theta})
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
    config = read(**sizes, rope_theta=theta, rope_scaling=rope)
    found = inverse_frequencies(head_dim, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-12)


def test_cosines_and_sines_grow_by_the_attention_factor():
    positions, inv_freq = torch.tensor([0, 1, 7]), inverse_frequencies(8, 100.0)
    for plain, grown in zip(
        rotation(positions, inv_freq, torch.float64),
        rotation(positions, inv_freq, torch.float64, attention_factor=1.5),
        strict=True,
    ):
        torch.testing.assert_close(grown, 1.5 * plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rope", SCALINGS, ids=str)
def test_a_scaling_survives_the_way_out_and_back(rope):
    config = read(rope_theta=500.0, rope_scaling=rope)
    written = json.loads(json.dumps(config.to_hugging_face()))
    four = {name: value for name, value in written.items() if name != "rope_parameters"}
    five = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    assert [ModelConfig.from_hugging_face(each) for each in (written, four, five)] == [config] * 3


def test_what_is_stretched_has_other_logits():
    """Else the comparisons above and those of whole models would mean nothing."""
    text, found = oracle.tokens(100), []
    for rope in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, {**LONG, "factor": 2.0}):
        found.append(oracle.expected(oracle.of_family("llama", rope_parameters={**rope, "rope_theta": 500.0}), text))
    assert (found[0] - found[1]).abs().max() > 0.1 and (found[0] - found[2]).abs().max() > 0.1


# Where the scaling stands


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, LinearScaling(2.0)),
        ({"type": "linear", "factor": 2}, LinearScaling(2.0)),
        (LONG, YarnScaling(4.0, 32768, pytest.approx(1.1386294361))),
        ({**LLAMA_31["rope_scaling"]}, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ({"rope_type": "default"}, None),
    ],
    ids=str,
)
def test_rope_scaling_counts_before_rope_parameters(scaling, expected):
    """Somebody extended a config.json that transformers 5 wrote."""
    written = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config = read(**written, rope_scaling={**scaling, "rope_theta": 5e5})
    assert (config.rope_theta, config.rope_scaling) == (5e5, expected)
    assert read(**written, rope_theta=5e5, rope_scaling=scaling) == config
    stretched = {**PLAIN, **written, "rope_theta": 5e5, "rope_scaling": dict(scaling)}
    theirs = LlamaConfig(**{name: value for name, value in stretched.items() if name != "model_type"}).rope_parameters
    assert theirs["rope_theta"] == 5e5 and theirs["rope_type"] == scaling.get("rope_type", scaling.get("type"))
    assert read(rope_parameters={**scaling, "rope_theta": 5e5}, rope_scaling=None) == config


def test_a_base_that_the_two_places_do_not_agree_on_is_refused():
    """transformers falls back to 10,000 here, which nobody wants."""
    written = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(UnsupportedModel, match="rope_theta of 10000.0, and its rope_parameters say 500000.0; write"):
        read(**written, rope_scaling=LONG)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported.*linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional'"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 4.0}}, r"\['yarn'\]"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "'mrope'"),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
            "default rope scaling has mrope_section",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {**LONG, "low_freq_factor": 1.0}}, "yarn rope scaling has low_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', and an object such as"),
        ({"rope_scaling": ["linear", 2.0]}, "rope_scaling is .*, and an object such as"),
        ({"rope_parameters": 2.0}, "rope_parameters is 2.0, and an object such as"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
            "each",
        ),
        ({"rope_scaling": {"type": "linear"}}, "does not say factor"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "does not say factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"factor is '2' \(str\), and a finite number > 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {**LONG, "original_max_position_embeddings": 4096.5}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LONG, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_theta": "1e6"}, r"rope_theta is '1e6' \(str\)"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ],
)
def test_what_is_not_computed_or_no_value_is_refused_by_name(changes, named):
    with pytest.raises(UnsupportedModel, match=named):
        read(**changes)


def test_llama_3_frequencies_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="high_freq_factor must exceed low_freq_factor; got 1.0 and 4.0"):
        read(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0})


def test_a_base_of_one_turns_all_pairs_alike_and_is_refused():
    with pytest.raises(ValueError, match="rope_theta must be a finite number > 1.*got 1.0"):
        read(rope_theta=1, rope_scaling=LONG)


def test_what_changes_nothing_may_stand_there():
    config = read(rope_theta=5e5)
    assert read(rope_theta=5e5, rope_scaling={}) == read(rope_theta=5e5, rope_parameters=None) == config
    assert read(rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 1.0, "factor": None}) == config
