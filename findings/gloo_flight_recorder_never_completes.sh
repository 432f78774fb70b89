#!/usr/bin/env bash
# PyTorch's flight recorder records gloo's collectives, too, but their state says "scheduled" for ever, though they have
# ended well; only `retired` changes. Messages between two ranks are not recorded at all. Whoever looks for the collective
# that hangs by its state finds every one of them.
# The way round: go by which ranks have an entry of a number.
. "$(dirname "$0")/environment.sh" "torch==2.13.0"

observe <<'EOF'
import os
import pickle
import sys
import tempfile
import time
from datetime import timedelta

os.environ["TORCH_FR_BUFFER_SIZE"] = "100"  # counts only if it is set before torch is imported
folder = tempfile.mkdtemp()
child = os.fork()
rank = 0 if child else 1
import torch
import torch.distributed as dist

dist.init_process_group(
    "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
x = torch.ones(4)
dist.all_reduce(x)
dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
dist.broadcast(x, 0)
entries, give_up = [{}], time.monotonic() + 30
while not all(entry.get("retired") for entry in entries) and time.monotonic() < give_up:
    time.sleep(0.1)
    entries = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())["entries"]
dist.barrier()
if rank == 1:
    os._exit(0)
os.waitpid(child, 0)
print("torch", torch.__version__.split("+")[0], "sum over two ranks", x.tolist())
for entry in entries:
    print(entry["profiling_name"], "state", entry["state"], "retired", entry["retired"])
sys.stdout.flush()
os._exit(0)
EOF
expect <<'EOF'
torch 2.13.0 sum over two ranks [2.0, 2.0, 2.0, 2.0]
gloo:all_reduce state scheduled retired True
gloo:broadcast state scheduled retired True
EOF
