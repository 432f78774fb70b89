#!/usr/bin/env bash
# transformers' generate without any length ends after 20 new tokens, whatever the prompt and whatever the model can
# hold, though neither asked for that. A warning says so, and calls the limit max_length. Always say max_new_tokens.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6

observe <<'EOF'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

logging.set_verbosity_error()
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=32, max_position_embeddings=512, eos_token_id=None, pad_token_id=0, **sizes)
model = LlamaForCausalLM(config).eval()
print("transformers", version("transformers"))
print("max_position_embeddings", config.max_position_embeddings)
for length in (1, 15, 40):
    prompt = torch.ones(1, length, dtype=torch.int64)
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
    print("prompt of", length, "tokens: new tokens", made.shape[1] - length)
EOF
expect <<'EOF'
transformers 5.24.0
max_position_embeddings 512
prompt of 1 tokens: new tokens 20
prompt of 15 tokens: new tokens 20
prompt of 40 tokens: new tokens 20
EOF
