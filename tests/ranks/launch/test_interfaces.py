"""The private interfaces of CPython that launch uses: they exist, and launch works on every Python at hand."""

import json
import shutil
import subprocess
import sys
import types
from multiprocessing import forkserver, process
from pathlib import Path

import cloudpickle
import pytest

from minilib.ranks.launch import UnsupportedPython
from minilib.ranks.launch.fork_server import check_interfaces
from tests.ranks.launch.scripts import SCRIPTS, environment

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
STAND_INS = {  # for what launch itself calls, on a Python that has no torch
    "torch/__init__.py": "def seed(): pass\ndef set_num_threads(threads): pass\n",
    "torch/distributed.py": "def FileStore(path, world_size): pass\ndef init_process_group(*place, **more): pass\n",
    "numpy/__init__.py": "",
    "numpy/random.py": "def seed(): pass\n",
}


def python(version: str) -> str | None:
    """The path of a Python of this version, of the tests' own or one that is installed beside it."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, candidates):
        ended = subprocess.run([path, "-c", show], capture_output=True, text=True, timeout=60)
        if ended.stdout.strip() == version:
            return str(path)
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_ranks_start_fail_and_end_on_every_python(version, tmp_path):
    path = python(version)
    if path is None:
        pytest.skip(f"no Python {version} is installed here")
    for name, text in STAND_INS.items():
        file = tmp_path / "stand_ins" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "stand_ins" / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path / 'stand_ins'}:{env['PYTHONPATH']}"
    command = [path, SCRIPTS / "on_any_python.py", "an argument"]
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    *said, line = ended.stdout.splitlines()
    found = json.loads(line)
    assert said == ["said on a rank"] * 2
    assert found["version"] == [int(number) for number in version.split(".")]
    assert found["places"] == [[rank, str(tmp_path), ["an argument"], True] for rank in (0, 1)]
    assert found["raised"].startswith("RankFailed: rank 1 of 2 failed:\nTraceback")
    assert found["raised"].endswith("ValueError: out of luck")
    assert found["exited"] == "RankFailed: rank 0 of 1 exited with code 3 before its function returned"
    assert found["killed"].startswith("RankFailed: rank 0 of 1 was killed by SIGKILL")
    assert found["late"].startswith("RanksTimedOut: 2 of 2 ranks had not returned after 0.5 s")
    assert found["forked"] == 42
    assert found["server"] == "RankFailed: rank 0 of 1 vanished: the fork server that started it is gone"
    assert found["after"] == "returned [0, 0]"


def module(**changes: object) -> types.SimpleNamespace:
    names = ("ForkServer", "get_inherited_fds", "read_signed")
    return types.SimpleNamespace(**{**{name: getattr(forkserver, name) for name in names}, **changes})


class OtherServer(forkserver.ForkServer):
    def connect_to_new_process(self, fds, authkey):
        raise NotImplementedError


class OtherProcess(process.BaseProcess):
    def _bootstrap(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("interfaces", "said"),
    [
        ([module(read_signed=None)], r"multiprocessing.forkserver.read_signed\(fd\), which is missing"),
        ([module(ForkServer=None)], r"forkserver.ForkServer.set_forkserver_preload\(.*\), which is missing"),
        (
            [module(ForkServer=OtherServer)],
            r"connect_to_new_process\(self, fds\), which takes other arguments.*authkey",
        ),
        ([forkserver, OtherProcess], r"BaseProcess._bootstrap\(self, parent_sentinel\), which takes other arguments"),
    ],
)
def test_an_interface_that_a_python_lacks_is_named(interfaces, said):
    with pytest.raises(UnsupportedPython, match=f"{said}.* in Python {sys.version.split()[0]}: use a Python on which"):
        check_interfaces(*interfaces)
