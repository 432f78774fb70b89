"""Write a checkpoint in Hugging Face's layout anew as one engine reads it, fp32, without a hub or a network.

Usage: python convert.py ENGINE FOLDER      reads FOLDER/hf; runs in the environment of its engine
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

MODEL = "model.safetensors"


def onnxruntime(folder: Path) -> None:
    """By ONNX Runtime GenAI's own model builder. No token ends a text but that of padding, taken for an end here."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", str(folder / "hf"),
               "-o", str(folder / "onnx"), "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]  # fmt: skip
    subprocess.run(command, check=True)
    path = folder / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = []
    path.write_text(json.dumps(config))


def ctranslate2(folder: Path) -> None:
    """By CTranslate2's own converter."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"), quantization="float32")


def llama_cpp(folder: Path) -> None:
    """As GGUF, every tensor fp32."""
    gguf_file(folder / "hf", folder / "f32.gguf")


def openvino(folder: Path) -> None:
    """By OpenVINO GenAI's GGUF reader, which has no fp32: it reads fp16, and fp32 matrices then take their places."""
    import openvino as ov
    import openvino_genai
    from openvino_tokenizers import convert_tokenizer
    from safetensors.numpy import load_file
    from transformers import PreTrainedTokenizerFast

    half = gguf_file(folder / "hf", folder / "gguf16" / "f16.gguf", np.float16)
    try:
        openvino_genai.LLMPipeline(str(half), "CPU", enable_save_ov_model=True)
    except (IndexError, RuntimeError) as error:  # of the tokenizer, which is made when the model has been saved
        print(f"as expected: {error}")
    model = ov.Core().read_model(half.with_name("openvino_model.xml"))
    config, tensors = json.loads((folder / "hf" / "config.json").read_text()), load_file(folder / "hf" / MODEL)
    for constant in model.get_ordered_ops():
        if constant.get_type_name() == "Constant" and constant.get_element_type() == ov.Type.f16:
            whole = ov.opset13.constant(_whole(constant.get_friendly_name(), constant.data, tensors, config))
            whole.set_friendly_name(constant.get_friendly_name())
            for reader in constant.output(0).get_target_inputs():  # a conversion to fp32
                for user in reader.get_node().output(0).get_target_inputs():
                    user.replace_source_output(whole.output(0))
    ov.save_model(model, folder / "ov" / "openvino_model.xml", compress_to_fp16=False)
    fast = PreTrainedTokenizerFast.from_pretrained(folder / "hf")
    for what, made in zip(("tokenizer", "detokenizer"), convert_tokenizer(fast, with_detokenizer=True), strict=True):
        ov.save_model(made, folder / "ov" / f"openvino_{what}.xml")
    (folder / "ov" / "config.json").write_text(json.dumps(config))


def _whole(name: str, half: np.ndarray, tensors: dict[str, np.ndarray], config: dict) -> np.ndarray:
    """The fp32 values that were rounded to the fp16 ones of a saved graph, which names matrices alone."""
    if half.size == 1:
        return half.astype(np.float32)
    inv_freq = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2, dtype=np.float32) / config["head_dim"])
    named = tensors.get(name.replace("layers[", "layers.").replace("].", "."))
    vectors = [tensor for tensor in (*tensors.values(), inv_freq) if tensor.ndim == 1]
    for tensor in vectors if named is None else [named]:
        if tensor.size == half.size and np.allclose(half.ravel(), tensor.ravel(), rtol=1e-3, atol=1e-4):
            return tensor.reshape(half.shape).astype(np.float32)
    raise ValueError(f"{name} of shape {half.shape} is no tensor of the checkpoint")


def gguf_file(source: Path, path: Path, matrices: type = np.float32) -> Path:
    """A Llama or Qwen3 checkpoint as GGUF, with words for tokens that nobody reads.

    Llama's query and key rows are stored in another order: GGUF rotates neighbours, Hugging Face's layout halves.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    kind, layers, vocabulary = config["model_type"], config["num_hidden_layers"], config["vocab_size"]
    names = gguf.get_tensor_name_map({"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[kind], layers)
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if matrices is np.float32 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([word.encode() for word in words(source)])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(source / MODEL).items():
        part = name.split(".")[-2]
        if kind == "llama" and part in heads:
            tensor = neighbours(tensor, heads[part])
        stored = tensor.astype(matrices if tensor.ndim == 2 else np.float32)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def words(source: Path) -> list[str]:
    """What tokens stand for, by their ids."""
    found = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(found, key=found.get)


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, …: what stood half a head apart is rotated side by side."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


CONVERTERS = {"onnxruntime": onnxruntime, "openvino": openvino, "ctranslate2": ctranslate2, "llama.cpp": llama_cpp}

if __name__ == "__main__":
    CONVERTERS[sys.argv[1]](Path(sys.argv[2]))
