"""Start ranks that write their pids into a folder and then sleep, until this process, unguarded too, is killed.

Usage: killed.py FOLDER
"""

import sys

from minilib.ranks import launch


def sleep(folder: str) -> None:
    import os
    import time
    from pathlib import Path

    import torch.distributed as dist

    (Path(folder) / f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    time.sleep(60)


launch.run(sleep, 2, sys.argv[1])
