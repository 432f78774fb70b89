"""Saving is all or nothing, whoever interrupts it; and the tokens that end a text."""

import errno
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.model.stored.files import CheckpointError
from tests.model import oracle

SHAPE = ModelConfig(97, 48, 80, 2, 6, 2, 16, 512, qk_norm=True, tie_embeddings=False)
MIXTURE = ModelConfig(97, 48, 8, 2, 6, 2, 16, 512, moe=MoEConfig(4, 2, 8))


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """With a checkpoint that somebody wants to keep."""
    weights.save(Decoder(SHAPE), tmp_path, torch.float32)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", ["weights", "config.json"])
def test_a_save_that_fails_leaves_what_was_there(at, error, folder, monkeypatch):
    def fail(*args, **options):
        if at == "weights":
            Path(args[1]).write_bytes(b"half of the weights")
        raise error

    before = content_of(folder)
    if at == "weights":
        monkeypatch.setattr(weights, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(type(error)):
        weights.save(Decoder(MIXTURE), folder)
    monkeypatch.undo()
    assert content_of(folder) == before


@pytest.mark.parametrize("moves", [0, 1])
def test_a_save_that_is_killed_between_its_moves_leaves_no_checkpoint_of_two(moves, folder, monkeypatch):
    done, replace = [], Path.replace

    def killed(path, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        weights.save(Decoder(MIXTURE), folder)
    monkeypatch.undo()
    assert done == ["model.safetensors"][:moves]
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "tokenizer.json"}
    with pytest.raises(CheckpointError, match="has no config.json"):
        weights.load(folder)
    weights.save(Decoder(MIXTURE), folder)  # which mends it
    assert weights.load(folder).config == MIXTURE


def test_everybody_may_read_what_was_saved_and_nothing_else_is_left(folder):
    assert content_of(folder).keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (folder / "config.json").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("kind", ["ZeRO-3", "expert parallelism"])
def test_a_model_that_is_not_whole_is_refused_before_anything_is_written(kind, folder, tmp_path):
    model = Decoder(MIXTURE)
    if kind == "ZeRO-3":  # between steps
        for parameter in model.parameters():
            parameter.data = parameter.new_empty(0)
    else:
        experts = model.layers[0].moe.down
        experts.weight = torch.nn.Parameter(experts.weight[:2])
    before = content_of(folder)
    with pytest.raises(CheckpointError, match=r"parameter .* has shape .*holds a part of the model; .*full_state_dict"):
        weights.save(model, folder)
    assert content_of(folder) == before
    with pytest.raises(CheckpointError):
        weights.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The tokens that end a text


def write(folder: Path, **files: object) -> None:
    for name, eos in files.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, "eos_token_id": eos}))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (23, [23, 30], (23, 30)),
        (23, 30, (30,)),
        ([7, 8], None, (7, 8)),
        (23, None, (23,)),
        (None, 0, (0,)),
        (None, None, ()),
        (23, [5, 5, 4], (5, 4)),
        (23, [], (23,)),
        (96, None, (96,)),
    ],
)
def test_generation_config_counts_before_config(config, generation, expected, folder):
    write(folder, config=config)
    assert weights.eos_token_ids(folder) == weights.eos_token_ids(str(folder))
    assert weights.eos_token_ids(folder) == tuple([config] if isinstance(config, int) else config or ())
    write(folder, generation_config=generation)
    assert weights.eos_token_ids(folder) == expected


@pytest.mark.parametrize("bad", ["13", -1, 97, 10**9, True, 13.0, [13, None], [[13]], {"id": 13}, ["</s>"]])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_what_is_no_token_id_is_refused_by_name(name, bad, folder):
    write(folder, **{name: bad})
    with pytest.raises(CheckpointError, match=f"^{name}.json has .* as eos_token_id, and token ids are .* 0 to 96"):
        weights.eos_token_ids(folder)


@pytest.mark.parametrize("ids", [(), (5,), (5, 96)])
@pytest.mark.parametrize(
    "shape", [SHAPE, MIXTURE, ModelConfig(97, 48, 80, 2, 6, 2, 16, 512)], ids=["qwen3", "mixtral", "llama"]
)
def test_saved_end_tokens_are_read_back_here_and_by_transformers(shape, ids, tmp_path):
    weights.save(Decoder(shape), tmp_path, eos_token_ids=ids)
    assert weights.eos_token_ids(tmp_path) == ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert theirs == (list(ids) if len(ids) > 1 else ids[0] if ids else None)  # and not its class's own


def test_end_tokens_that_are_none_are_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="save has 97 as eos_token_id"):
        weights.save(Decoder(SHAPE), tmp_path / "model", eos_token_ids=(97,))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("ids", [3, [3, 4]])
def test_end_tokens_that_transformers_saves_are_read(ids, tmp_path):
    theirs = oracle.llama()
    theirs.generation_config.eos_token_id = ids
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2  # the class's own
    assert weights.eos_token_ids(tmp_path) == tuple([ids] if isinstance(ids, int) else ids)
