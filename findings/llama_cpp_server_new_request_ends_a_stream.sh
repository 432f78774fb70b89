#!/usr/bin/env bash
# llama-cpp-python's server ends the stream that it is sending as soon as another request comes, and the stream looks
# whole: it ends with [DONE], with a part of its tokens and without a finish_reason. (The connection is cut behind [DONE],
# where clients do not look any more.) Expected: the second request waits. It does so with --interrupt_requests False; True
# is the default. A client can tell a cut text by the missing finish_reason alone.
. "$(dirname "$0")/environment.sh" "llama-cpp-python[server]==0.3.36" gguf==0.19.0 numpy==2.4.6 httpx==0.28.1

observe <<'EOF'
import json
import socket
import subprocess
import sys
import time
from importlib.metadata import version

import gguf
import httpx
import numpy as np

LETTERS, WIDTH, TOKENS = 300, 64, 3000
random = np.random.default_rng(0)
writer = gguf.GGUFWriter("model.gguf", "llama")
for add, value in ((writer.add_block_count, 1), (writer.add_context_length, 4096), (writer.add_embedding_length, WIDTH),
                   (writer.add_feed_forward_length, 128), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
                   (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, LETTERS),
                   (writer.add_tokenizer_model, "llama"), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 0),
                   (writer.add_unk_token_id, 0), (writer.add_add_space_prefix, False)):
    add(value)
writer.add_token_list([chr(0x4E00 + token).encode() for token in range(LETTERS)])
writer.add_token_scores([0.0] * LETTERS)
writer.add_token_types([gguf.TokenType.NORMAL] * LETTERS)
shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
          "ffn_gate": (128, WIDTH), "ffn_up": (128, WIDTH), "ffn_down": (WIDTH, 128)}
tensors = {f"blk.0.{name}.weight": random.normal(size=shape) for name, shape in shapes.items()}
tensors |= {name: np.ones(WIDTH) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")}
table = random.normal(size=(LETTERS, WIDTH))
table[0] = 0  # the end token is never the likeliest
tensors |= {"token_embd.weight": table, "output.weight": table}
for name, tensor in tensors.items():
    writer.add_tensor(name, tensor.astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def stream(port: int, and_then) -> tuple[int, list, bool]:
    """Letters, the reasons why the text ended, and whether [DONE] came; calls and_then after the first letter."""
    body = {"prompt": chr(0x4E05), "max_tokens": TOKENS, "temperature": 0, "stream": True}
    letters, reasons, done = 0, [], False
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                done = True
                break
            if line.startswith("data: "):
                (choice,) = json.loads(line[6:])["choices"]
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                if choice["text"] and not letters:
                    and_then()
                letters += len(choice["text"])
    return letters, reasons, done


def serve(*options: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", "model.gguf", "--n_ctx", "4096", "--verbose",
               "False", "--host", "127.0.0.1", "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            try:
                httpx.get(f"{url}/models")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        second = []

        def ask() -> None:
            short = {"prompt": chr(0x4E07), "max_tokens": 1, "temperature": 0}
            second.append(httpx.post(f"{url}/completions", json=short, timeout=120).status_code)

        letters, reasons, done = stream(port, ask)
        print(f"{' '.join(options) or 'defaults'}: all letters: {letters == TOKENS}, finish reasons: {reasons}, "
              f"[DONE]: {done}, second request: {second}")
    finally:
        server.kill()
        server.wait()


print("llama-cpp-python", version("llama-cpp-python"))
serve()
serve("--interrupt_requests", "False")
EOF
expect <<'EOF'
llama-cpp-python 0.3.36
defaults: all letters: False, finish reasons: [], [DONE]: True, second request: [200]
--interrupt_requests False: all letters: True, finish reasons: ['length'], [DONE]: True, second request: [200]
EOF
