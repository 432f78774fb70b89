"""Every way in which ranks end, as JSON; runs without torch, too, on the stand-ins that test_interfaces.py writes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from minilib.ranks import launch


def place() -> list:
    print("said on a rank")
    return [int(os.environ["RANK"]), str(Path.cwd()), sys.argv[1:], "late" in sys.path]


def fails() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("out of luck")
    time.sleep(60)


def kills_the_fork_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def caught(*args, **options) -> str:
    try:
        return f"returned {launch.run(*args, **options)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def in_a_fork() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(40 + len(launch.run(int, 2)))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


sys.path.append("late")
found = {
    "version": sys.version_info[:2],
    "places": launch.run(place, 2),
    "raised": caught(fails, 2),
    "exited": caught(os._exit, 1, 3),
    "killed": caught(lambda: os.kill(os.getpid(), signal.SIGKILL), 1),
    "late": caught(time.sleep, 2, 60, timeout=0.5),
    "forked": in_a_fork(),
    "server": caught(kills_the_fork_server, 1),
    "after": caught(int, 2),
}
print(json.dumps(found))
