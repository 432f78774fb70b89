#!/usr/bin/env bash
# ONNX Runtime GenAI with an empty list of end tokens ("eos_token_id": []) does not generate without an end: it takes the
# token of padding for the end of a text, and gives padding from there on. The same model with an end token that is not
# generated goes on. Expected: no end token, no end. Way round it: name an end token that cannot come.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6 \
    onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0

observe <<'EOF'
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, eos_token_id=0, pad_token_id=0,
                                     bos_token_id=0, num_key_value_heads=2, **sizes))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
model.save_pretrained("hf")
words = models.WordLevel({f"t{token}": token for token in range(256)}, "t0")
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0").save_pretrained("hf")
build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "hf", "-i", "hf", "-o", "onnx", "-p", "fp32",
         "-e", "cpu", "-c", "cache"]
subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
path = Path("onnx", "genai_config.json")
config = json.loads(path.read_text())


def generate(end, padding):
    config["model"] |= {"eos_token_id": end, "pad_token_id": padding}
    path.write_text(json.dumps(config))
    loaded = genai.Model("onnx")
    params = genai.GeneratorParams(loaded)
    params.set_search_options(batch_size=1, max_length=20, do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(np.arange(1, 9, dtype=np.int32)[None])
    made = []
    for _ in range(12):
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    return made


print("onnxruntime-genai", version("onnxruntime-genai"))
free = generate([255], 0)
padding = free[5]
print("differing tokens, none of them the end:", len(set(free)) > 3 and 255 not in free)
ended = generate([], padding)
same = free.index(padding) + 1
print("no end token, padding is the sixth token: same up to there:", ended[:same] == free[:same])
print("afterwards padding alone:", set(ended[same:]) == {padding}, "and that is not what goes on:", ended != free)
print("end token named:", generate([255], padding) == free)
EOF
expect <<'EOF'
onnxruntime-genai 0.18.0
differing tokens, none of them the end: True
no end token, padding is the sixth token: same up to there: True
afterwards padding alone: True and that is not what goes on: True
end token named: True
EOF
