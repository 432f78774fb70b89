"""Who is counted as a neighbour: everybody but this process and its descendants."""

import subprocess
import sys
import time

import pytest

from minilib.numbers import neighbours
from minilib.numbers.neighbours import Watch

WORK = "import time\nwhile time.process_time() < 0.4: pass"
FORKED = f"import os\nif os.fork() == 0:\n    exec({WORK!r})\n    os._exit(0)\nos.wait()"


@pytest.fixture
def clocks(monkeypatch):
    """Two cores; what the clocks say next, as (elapsed, everybody, own)."""
    says = []
    monkeypatch.setattr(neighbours, "_clocks", lambda: says.pop(0))
    monkeypatch.setattr(neighbours, "_cores", lambda: [0, 1])
    return says


@pytest.mark.parametrize(
    ("later", "busy"),
    [
        ((14.0, 100.0, 5.0), 0.0),  # nobody worked
        ((14.0, 108.0, 13.0), 0.0),  # this process alone kept both cores busy
        ((14.0, 104.02, 7.0), 0.25),  # of 8 core seconds it took 2, others 2, and a tick of each core is in doubt
        ((10.1, 100.02, 5.0), 0.0),
        ((10.1, 100.12, 5.1), 0.0),
        ((14.0, 108.02, 5.0), 1.0),
        ((14.0, 103.9, 9.0), 0.0),  # ticks are coarser than its own clock
        ((14.0, 109.0, 5.0), 1.0),
        ((10.0, 100.0, 5.0), 0.0),  # no time has passed
    ],
)
def test_busy_is_what_others_took_of_all_cores(later, busy, clocks):
    clocks += [(10.0, 100.0, 5.0), later]
    assert Watch().busy == pytest.approx(busy, abs=1e-9)


@pytest.mark.parametrize("script", [WORK, FORKED])
@pytest.mark.skipif(sys.platform != "linux", reason="processes that have ended are in nobody's account here")
def test_the_work_of_descendants_is_ones_own(script):
    before = neighbours._clocks()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    after = neighbours._clocks()
    assert after[2] - before[2] >= 0.35
    assert after[1] - before[1] >= 0.3  # everybody's account holds it, too


def test_the_work_of_a_running_descendant_is_ones_own():
    before = neighbours._descendants()
    with subprocess.Popen([sys.executable, "-c", WORK.replace("0.4", "99")]) as worker:
        try:
            while neighbours._descendants() - before < 0.4:  # pytest's own time limit ends it if this never comes
                time.sleep(0.05)
        finally:
            worker.kill()
