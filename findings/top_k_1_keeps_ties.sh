#!/usr/bin/env bash
# transformers' TopKLogitsWarper with top_k = 1 keeps every token whose score ties with the best one, so sampling
# with top_k = 1 is not greedy decoding: of the four tied tokens, each is drawn. Scores in bf16 have eight
# significant bits, so ties happen.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6

observe <<'EOF'
from importlib.metadata import version

import torch
from transformers import TopKLogitsWarper

torch.manual_seed(0)
scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 3.0]])
kept = TopKLogitsWarper(top_k=1)(None, scores)
drawn = torch.multinomial(kept.softmax(-1), 1000, replacement=True)
print("transformers", version("transformers"))
print("tokens kept by top_k = 1:", kept.isfinite().nonzero()[:, 1].tolist())
print("tokens drawn in 1,000 samples:", drawn.unique().tolist())
print("greedy:", scores.argmax(-1).tolist())
EOF
expect <<'EOF'
transformers 5.24.0
tokens kept by top_k = 1: [1, 2, 4, 5]
tokens drawn in 1,000 samples: [1, 2, 4, 5]
greedy: [1]
EOF
