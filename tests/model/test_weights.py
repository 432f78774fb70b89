import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from minilib.model import weights
from minilib.model.config import ModelConfig, UnsupportedModel
from minilib.model.decoder import Decoder
from minilib.model.stored.files import CheckpointError
from minilib.model.stored.shards import Shards
from tests.model import oracle

KINDS = {
    "llama": lambda: oracle.llama(),
    "llama, tied": lambda: oracle.llama(tie_word_embeddings=True),
    "llama 3.1": lambda: oracle.llama(rope_parameters=oracle.LLAMA_31, rms_norm_eps=1e-3),
    "llama, one kv head": lambda: oracle.llama(num_key_value_heads=1),
    "qwen3": lambda: oracle.qwen3(),
    "qwen3, tied": lambda: oracle.qwen3(tie_word_embeddings=True),
}
SHAPE = ModelConfig(97, 48, 80, 2, 6, 2, 16, 512, qk_norm=True, tie_embeddings=False)
LONG = oracle.tokens(100)  # three times as long as what LLAMA_31 is stretched from
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A llama checkpoint of one file, to be broken."""
    oracle.llama().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, tensors=None, **config) -> None:
    """Change the stored tensors with a function, and entries of the config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file({name: tensor.clone() for name, tensor in stored.items()}, folder / "model.safetensors")


def mapped(folder: Path) -> bool:
    """Whether a file in the folder is open or mapped into this process."""
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("needs /proc to see which files are open")
    targets = [str(handle.readlink()) for handle in handles.iterdir() if handle.is_symlink()]
    return str(folder) in "\n".join([*targets, Path("/proc/self/maps").read_text()])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    theirs = KINDS[kind]()
    theirs.save_pretrained(tmp_path)
    mine = weights.load(tmp_path)
    expected = oracle.expected(theirs, LONG)
    assert expected.std() > 0.5  # else closeness would mean nothing
    torch.testing.assert_close(oracle.logits(mine, LONG), expected, rtol=0, atol=1e-4)


def test_scaling_matters_beyond_the_original_positions():
    stretched = oracle.llama(rope_parameters=oracle.LLAMA_31)
    plain = oracle.llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert (oracle.expected(stretched, LONG) - oracle.expected(plain, LONG)).abs().max() > 0.1


def test_many_shards_read_as_one_file(tmp_path):
    theirs = oracle.qwen3()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = weights.load(tmp_path / "one").state_dict(), weights.load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_save_wrote(kind, tmp_path):
    KINDS[kind]().save_pretrained(tmp_path / "theirs")
    mine = weights.load(tmp_path / "theirs")
    path = weights.save(mine, tmp_path / "new" / "mine", torch.float32)
    assert path == tmp_path / "new" / "mine" / "model.safetensors"
    assert load_file(path).keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    theirs, report = AutoModelForCausalLM.from_pretrained(path.parent, output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected or of another shape
    torch.testing.assert_close(oracle.expected(theirs, LONG), oracle.logits(mine, LONG), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_and_loaded_gives_the_same_logits(tied, tmp_path):
    model = Decoder(ModelConfig(97, 48, 80, 2, 6, 2, 16, 512, tie_embeddings=tied))
    weights.save(model, tmp_path, torch.float32)
    loaded = weights.load(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert (loaded.unembed.weight is loaded.embed.weight) == tied
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(oracle.logits(loaded, LONG), oracle.logits(model, LONG))


@pytest.mark.parametrize("kind", ["llama 3.1", "qwen3, tied"])
def test_bf16_loads_as_transformers_does(kind, tmp_path):
    whole = KINDS[kind]()
    whole.save_pretrained(tmp_path)
    mine = weights.load(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in mine.parameters()} == {torch.bfloat16}
    assert mine.inv_freq.dtype == torch.float32  # positions beyond 256 have no place in bf16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    exact = oracle.expected(whole, LONG)
    off_mine = (oracle.logits(mine, LONG).float() - exact).abs().mean()
    off_theirs = (oracle.expected(theirs, LONG).float() - exact).abs().mean()
    assert off_mine < 1.5 * off_theirs


def test_bf16_weights_load_into_fp32(tmp_path):
    path = weights.save(Decoder(SHAPE), tmp_path)  # bf16 if not told
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in weights.load(tmp_path).parameters()} == {torch.float32}


def test_computed_frequencies_in_an_old_checkpoint_are_passed_over(folder):
    expected = oracle.logits(weights.load(folder), LONG)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda stored: stored.update({name: torch.ones(4)}))
    assert torch.equal(oracle.logits(weights.load(folder), LONG), expected)


def test_a_missing_file_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere has no config.json"):
        weights.load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        weights.load(folder)


@pytest.mark.parametrize(
    ("content", "said"), [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "holds no JSON object")]
)
def test_a_config_that_is_no_config_is_named(content, said, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json {said}"):
        weights.load(folder)


def test_an_unknown_kind_of_model_is_named(folder):
    rewrite(folder, model_type="gpt2")
    with pytest.raises(UnsupportedModel, match="'gpt2'"):
        weights.load(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, 50_000])
def test_a_truncated_file_is_named(kept, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read, it may be truncated"):
        weights.load(folder)
    assert not mapped(folder)


def test_a_missing_or_truncated_shard_is_named(tmp_path):
    oracle.llama().save_pretrained(tmp_path, max_shard_size="20KB")
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{last.name} cannot be read") as caught:
        weights.load(tmp_path)
    assert caught.tb and not mapped(tmp_path)  # those opened before it are closed, though the traceback still lives
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"these are missing: \['{last.name}'\]"):
        weights.load(tmp_path)


@pytest.mark.parametrize("index", ['{"weight_map": {}}', "{}"])
def test_an_index_without_shards_is_named(index, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json names the shards"):
        weights.load(folder)


@pytest.mark.parametrize("lost", [NORM, DOWN, "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(lost, folder):
    rewrite(folder, lambda stored: stored.pop(lost))
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        weights.load(folder)
    assert not mapped(folder)


@pytest.mark.parametrize(
    ("name", "shape"), [(NORM, (47,)), (DOWN, (80, 48)), ("model.layers.0.self_attn.v_proj.weight", (48, 48))]
)
def test_a_tensor_of_another_shape_is_named(name, shape, folder):
    rewrite(folder, lambda stored: stored.update({name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} has shape \({shape[0]},.*config\.json asks for \("):
        weights.load(folder)
    assert not mapped(folder)


def test_a_tensor_left_over_is_named(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda stored: stored.update({name: torch.zeros(48)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place"):
        weights.load(folder)
    rewrite(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=f"tensor {name} and 9 more ha"):
        weights.load(folder)


def test_an_output_projection_is_missing_only_if_it_is_not_tied(folder):
    rewrite(folder, lambda stored: stored.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lm_head.weight is missing.*tie_word_embeddings"):
        weights.load(folder)
    rewrite(folder, tie_word_embeddings=True)
    model = weights.load(folder)
    assert model.unembed.weight is model.embed.weight


def test_a_tied_output_projection_stored_with_other_values_is_no_surprise(tmp_path):
    """Either refused by name, or the logits are transformers'."""
    oracle.llama().save_pretrained(tmp_path)  # untied: lm_head is not the embedding table
    rewrite(tmp_path, tie_word_embeddings=True)
    theirs = oracle.expected(AutoModelForCausalLM.from_pretrained(tmp_path), LONG)
    try:
        mine = oracle.logits(weights.load(tmp_path), LONG)
    except CheckpointError as error:
        assert "lm_head.weight" in str(error)
    else:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_saving_over_shards_replaces_them(tmp_path):
    oracle.llama().save_pretrained(tmp_path, max_shard_size="20KB")
    model = weights.load(tmp_path)
    with torch.no_grad():
        model.norm.weight += 1
    weights.save(model, tmp_path, torch.float32)
    assert torch.equal(weights.load(tmp_path).norm.weight, model.norm.weight)


def test_a_loaded_model_lets_go_of_its_files(folder):
    model = weights.load(folder)
    before = model.embed.weight.detach().clone()
    with (folder / "model.safetensors").open("r+b") as file:  # as `cp` or `rsync --inplace` over it would
        file.seek(2000)
        file.write(bytes(40_000))
    assert torch.equal(model.embed.weight, before)
    assert not mapped(folder)


def test_files_are_open_while_a_parameter_is_read_and_no_longer(folder, monkeypatch):
    """What was read of a file that stays open counts as memory of the process, beside the weights themselves."""
    seen, read = [], Shards.read

    def watched(shards, parts):
        seen.append(mapped(folder))
        read(shards, parts)

    monkeypatch.setattr(Shards, "read", watched)
    weights.load(folder)
    assert len(seen) > 10 and not any(seen)


def test_loading_brings_in_no_symbolic_algebra():
    """Some operations on the meta device load SymPy, which takes 140 MiB."""
    code = "import sys; from minilib.model import weights as w; w.load(w.PRETRAINED); sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make on real devices."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor) and not x.is_meta}
        if isinstance(result, torch.Tensor) and not result.is_meta:
            storage = result.untyped_storage()
            self.bytes += storage.nbytes() if storage.data_ptr() not in given else 0
        return result


def test_loading_allocates_the_weights_once(folder):
    with Allocated() as allocated:
        model = weights.load(folder)
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert allocated.bytes < 1.2 * parameter_bytes
