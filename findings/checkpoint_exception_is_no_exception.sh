#!/usr/bin/env bash
# torch.distributed.checkpoint raises CheckpointException, which derives from BaseException. `except Exception`,
# around a load that may fail, lets it through: a fallback to the checkpoint before is never reached. Name it in the
# except clause.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
import logging
import warnings
from importlib.metadata import version

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
logging.disable()  # it also logs that the folder is not there
print("torch", version("torch").partition("+")[0])
try:
    try:
        dcp.load({"w": torch.zeros(2)}, checkpoint_id="a-folder-that-is-not-there")
    except Exception:
        print("caught by except Exception")
except BaseException as error:
    print("passed except Exception:", type(error).__name__, [kind.__name__ for kind in type(error).__mro__[1:-1]])
EOF
expect <<'EOF'
torch 2.13.0
passed except Exception: CheckpointException ['BaseException']
EOF
