#!/usr/bin/env bash
# torch.profiler writes a line at its start and its end to file descriptor 2, below Python:
# contextlib.redirect_stderr does not catch them. Each has the time and the process id in it, so that what captures
# the descriptor, as a notebook's kernel does, never sees the same output twice.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
import contextlib
import io
import os
import tempfile
from importlib.metadata import version

import torch

print("torch", version("torch").partition("+")[0])
caught = io.StringIO()
with tempfile.TemporaryFile() as below:
    kept = os.dup(2)
    os.dup2(below.fileno(), 2)
    with contextlib.redirect_stderr(caught):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            torch.ones(2).sum()
    os.dup2(kept, 2)
    below.seek(0)
    lines = below.read().decode().splitlines()
print("lines on sys.stderr:", len(caught.getvalue().splitlines()))
print("lines on file descriptor 2:", len(lines))
for line in lines:
    print("  ", line.rpartition("] ")[2])  # what comes before is the time, the process and the source line
EOF
expect <<'EOF'
torch 2.13.0
lines on sys.stderr: 0
lines on file descriptor 2: 2
   profiler_start
   profiler_stop
EOF
