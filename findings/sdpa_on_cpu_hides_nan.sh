#!/usr/bin/env bash
# scaled_dot_product_attention on a CPU gives 0, and not NaN, for a query that is NaN while there are few keys; with
# more keys, or on the math backend, it gives NaN. A NaN upstream can so leave no trace in a short sequence: check
# activations before attention, or compare on the math backend.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
from importlib.metadata import version

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

print("torch", version("torch").partition("+")[0])
for keys in (1, 64):
    query = torch.full((1, 1, 1, 16), float("nan"))
    key = value = torch.ones(1, 1, keys, 16)
    default = scaled_dot_product_attention(query, key, value)[0, 0, 0, 0].item()
    with sdpa_kernel(SDPBackend.MATH):
        math = scaled_dot_product_attention(query, key, value)[0, 0, 0, 0].item()
    print(f"{keys} keys: by default {default}, on the math backend {math}")
EOF
expect <<'EOF'
torch 2.13.0
1 keys: by default 0.0, on the math backend nan
64 keys: by default nan, on the math backend nan
EOF
