#!/usr/bin/env bash
# An all-reduce of bf16 over gloo rounds after every addition, in an order that differs from place to place of the
# tensor: eight equal columns, 256 + 1 + 1 + 1, come back as two different sums. The exact sum is 259, which bf16
# rounds to 260. So "the same numbers give the same sum" does not hold within one tensor; reduce in fp32 where that
# matters.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
import multiprocessing
import os
from importlib.metadata import version

import torch
import torch.distributed as dist


def work(number, queue):
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=number, world_size=4)
    x = torch.full((8,), 256.0 if number == 0 else 1.0, dtype=torch.bfloat16)
    dist.all_reduce(x)
    queue.put((number, x.tolist()))
    dist.destroy_process_group()


print("torch", version("torch").partition("+")[0])
fork = multiprocessing.get_context("fork")
queue = fork.Queue()
ranks = [fork.Process(target=work, args=(number, queue)) for number in range(4)]
for process in ranks:
    process.start()
for number, sums in sorted(queue.get(timeout=60) for _ in ranks):
    print("rank", number, [int(x) for x in sums])
for process in ranks:
    process.join(10)
EOF
expect <<'EOF'
torch 2.13.0
rank 0 [260, 260, 256, 256, 256, 256, 260, 260]
rank 1 [260, 260, 256, 256, 256, 256, 260, 260]
rank 2 [260, 260, 256, 256, 256, 256, 260, 260]
rank 3 [260, 260, 256, 256, 256, 256, 260, 260]
EOF
