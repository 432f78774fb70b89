#!/usr/bin/env bash
# PyTorch's flight recorder records gloo's collectives, and its analyser, torchfrtrace, stops with a KeyError when it is
# given their dumps: entries say that they are of group "0", and the dump's list of groups has it under no name.
# The way round: list the groups under the names that the entries have, before the analyser reads the dumps.
. "$(dirname "$0")/environment.sh" "torch==2.13.0" "tabulate==0.9.0"

observe <<'EOF'
import os
import pickle
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
folder = Path(tempfile.mkdtemp())
child = os.fork()
rank = 0 if child else 1
import torch
import torch.distributed as dist

dist.init_process_group(
    "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2, timeout=timedelta(seconds=30)
)
for _ in range(3):
    dist.all_reduce(torch.ones(4))
dump = torch._C._distributed_c10d._dump_fr_trace()
(folder / f"trace_{rank}").write_bytes(dump)
dist.barrier()
if rank == 1:
    os._exit(0)
os.waitpid(child, 0)
print("torch", torch.__version__.split("+")[0], "process groups:", pickle.loads(dump)["pg_config"])
analyser = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", "--prefix", "trace_", str(folder)]


def analyse():
    done = subprocess.run(analyser, capture_output=True, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


print("as it is:", *analyse())
for number in range(2):
    path = folder / f"trace_{number}"
    content = pickle.loads(path.read_bytes())
    names = {entry["process_group"][0] for entry in content["entries"]}
    content["pg_config"] = {name: {"name": name, "desc": "default_pg", "ranks": "[0, 1]"} for name in names}
    path.write_bytes(pickle.dumps(content))
print("with the group under its name:", analyse()[0])
sys.stdout.flush()
os._exit(0)
EOF
expect <<'EOF'
torch 2.13.0 process groups: {'': {'name': '', 'desc': '', 'ranks': '[0, 1]'}}
as it is: 1 KeyError: ('0', 0)
with the group under its name: 0
EOF
