"""Bursts of load: the same for the same seed, there while the command runs, and always gone with it."""

import itertools
import os
import signal
import subprocess
import sys
import time

import psutil

from minilib.numbers.records import ROOT
from tools import under_load


def run(*command: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tools.under_load", "7", *command], cwd=ROOT, text=True, **options)


def test_bursts_are_those_of_the_seed_and_of_the_process():
    def first(seed, number):
        return list(itertools.islice(under_load.bursts(seed, number), 100))

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1) != first(2, 1)
    assert all(0.5 <= work <= 4 and 1 <= rest <= 6 for work, rest in first(1, 0))


def test_the_exit_code_is_the_commands():
    code = "import sys; print('here'); sys.exit(3)"
    with run(sys.executable, "-c", code, stdout=subprocess.PIPE) as process:
        assert process.communicate(timeout=60)[0] == "here\n"
    assert process.returncode == 3


def test_a_process_per_core_works_and_ends_with_the_block():
    with under_load.load(7) as workers:
        assert len(workers) == os.cpu_count()
        while not all(psutil.Process(worker.pid).cpu_times().user > 0.3 for worker in workers):
            time.sleep(0.05)
        assert all(worker.poll() is None for worker in workers)
    assert all(worker.poll() is not None for worker in workers)


def test_no_load_is_left_behind_when_the_command_is_killed():
    with run(
        sys.executable, "-c", "import time; print('here', flush=True); time.sleep(99)", stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "here\n"
        family = psutil.Process(process.pid).children()
        assert len(family) == os.cpu_count() + 1
        os.kill(process.pid, signal.SIGKILL)
        load = [child for child in family if "under_load" in " ".join(child.cmdline())]
        assert len(load) == os.cpu_count()
        assert not psutil.wait_procs(load, timeout=60)[1]
        for child in family:
            if child not in load:
                child.kill()
