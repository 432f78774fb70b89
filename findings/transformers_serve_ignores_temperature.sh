#!/usr/bin/env bash
# `transformers serve` answers /v1/completions with the likeliest tokens whatever "temperature" a request asks for, and
# with status 200, unless the model's generation_config.json has do_sample: an OpenAI client that asks for temperature 5
# sixteen times gets one text. Expected: a temperature above 0 samples, as in OpenAI's API, whose default is 1. Way round:
# write {"do_sample": true} into generation_config.json. (transformers 5.24.0, with and without --continuous-batching.)
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 tokenizers==0.23.3 \
    fastapi==0.165.0 uvicorn==0.54.0 openai==3.57.0 httpx==0.28.1

observe <<'EOF'
import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=256, **sizes)).save_pretrained("model")
tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(100)}, "t0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.save("model/tokenizer.json")
special = {f"{which}_token": "t0" for which in ("unk", "bos", "eos")}
Path("model/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special))


def texts(generation: dict, *options: str) -> int:
    """Different texts in sixteen answers to one prompt at temperature 5."""
    Path("model/generation_config.json").write_text(json.dumps(generation))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "model", "--host", "127.0.0.1", "--port",
               str(port), "--device", "cpu", "--dtype", "float32", *options]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quiet)
    try:
        for _ in range(900):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        body = {"model": "model", "prompt": "t3 t5 t7", "max_tokens": 4, "temperature": 5.0}
        answers = [httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) for _ in range(16)]
        assert all(answer.status_code == 200 for answer in answers)
        return len({answer.json()["choices"][0]["text"] for answer in answers})
    finally:
        server.kill()
        server.wait()


print("transformers", version("transformers"))
for options in ((), ("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "64")):
    for generation in ({}, {"do_sample": True}):
        found = texts(generation, *options)
        print(f"{'continuous batching' if options else 'one by one'}, generation_config {generation}:",
              "one text" if found == 1 else "many texts")
EOF
expect <<'EOF'
transformers 5.24.0
one by one, generation_config {}: one text
one by one, generation_config {'do_sample': True}: many texts
continuous batching, generation_config {}: one text
continuous batching, generation_config {'do_sample': True}: many texts
EOF
