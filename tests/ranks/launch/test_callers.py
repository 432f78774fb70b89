"""`launch.run` called from everywhere: scripts, notebooks, torchrun on one host and on two."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.ranks.launch.scripts import SCRIPTS, environment

# Scripts and notebooks


def test_a_main_script_is_not_run_again_even_if_it_has_no_file_and_no_guard():
    done = subprocess.run(
        [sys.executable, "-"],
        input=(SCRIPTS / "unguarded.py").read_text(),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("[40, 41]\n", "")


def test_a_function_from_a_notebook_cell():
    nbclient, v4 = pytest.importorskip("nbclient"), pytest.importorskip("nbformat.v4")
    cells = [
        "import time\nfrom minilib.ranks.launch import run\nimport torch.distributed",
        "base = 40\ndef make(x):\n    def add():\n        print('here')\n        return base + x\n    return add",
        "run(make(1), 2)",
        "def fail():\n    raise ValueError('a line of this cell')\nrun(fail, 2)",
        "run(time.sleep, 2, 60)",
        "run(make(2), 1)",
    ]
    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=60, interrupt_on_timeout=True, allow_errors=True)

    def execute(number: int, timeout: float = 60.0) -> list:
        client.timeout = timeout  # when it has passed, the client interrupts the kernel, as a reader might
        return client.execute_cell(notebook.cells[number], number).outputs

    with client.setup_kernel(env=environment()):
        execute(0)
        execute(1)
        printed, value = execute(2)
        assert printed.text == "here\n" * 2
        assert value.data["text/plain"] == "[41, 41]"
        [error] = execute(3)
        assert error.ename == "RankFailed"
        assert "raise ValueError('a line of this cell')\nValueError" in error.evalue
        [error] = execute(4, timeout=1.0)
        assert error.ename == "KeyboardInterrupt"
        assert execute(5)[-1].data["text/plain"] == "[42]"


# torchrun


def torchrun(*options: object, script: str, args: tuple = (), prefix: tuple = ()) -> list[str]:
    command = (*prefix, sys.executable, "-m", "torch.distributed.run", *options, SCRIPTS / script, *args)
    return [str(word) for word in command]


def finish(commands: list[list[str]], seconds: float = 120.0, **variables: str) -> list[tuple[int, str]]:
    """Run the commands at the same time; exit code and output of each. Nothing of them is left."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, env=environment(**variables), stdout=log, stderr=log)
            stack.callback(end, process)
            processes.append((process, log))
        deadline = time.monotonic() + seconds
        done = []
        for process, log in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            log.seek(0)
            done.append((process.returncode, log.read()))
    return done


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
    process.wait()


def test_under_torchrun(tmp_path):
    command = torchrun("--standalone", "--nproc-per-node=2", script="under_torchrun.py", args=(tmp_path,))
    [(code, log)] = finish([command])
    assert code == 0, log
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    pids = [[rank, seen[rank]["pid"]] for rank in (0, 1)]
    for rank in (0, 1):
        assert seen[rank]["values"] == pids
        assert seen[rank]["again"] == [30.0, 30.0]
        assert seen[rank]["threads"] == [2, 2]
        kind, message, _ = seen[rank]["wrong world"]
        assert kind == "ValueError" and "world_size is 3, but torchrun started WORLD_SIZE=2 ranks" in message
        assert [nested[0] for nested in seen[rank]["nested"]] == ["NestedRun"] * 2
        kind, message, failed = seen[rank]["failure"]
        assert (kind, failed) == ("RankFailed", "1")
        assert message.startswith("rank 1 of 2 failed:\nTraceback")
        assert message.endswith("ValueError: out of luck")


def two_hosts(address: str, port: int, ranks_per_host: int) -> list[tuple]:
    """Options of torchrun for two hosts, the first of which is where all meet."""
    common = (
        "--nnodes=2",
        f"--nproc-per-node={ranks_per_host}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}:{port}",
    )
    return [(*common, "--rdzv-id=two-hosts", f"--rdzv-conf=is_host={meet}") for meet in (1, 0)]


# Two hosts: network namespaces with a wire between them. On one machine: tests/ranks/test_collectives_two_hosts.py


@pytest.fixture
def namespaces() -> Iterator[Callable[..., tuple[str, str]]]:
    """A function that makes two network namespaces, 10.77.0.1 and 10.77.0.2, and shapes what both send."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"no `{tool}` (iproute2) on this machine")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = (f"minilib-{os.getpid()}-a", f"minilib-{os.getpid()}-b")

    def make(*shape: str) -> tuple[str, str]:
        for name in names:
            command("ip", "netns", "add", name)
        command(
            "ip", "link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1]
        )
        for number, name in enumerate(names, 1):
            command("ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "wire")
            for link in ("lo", "wire"):
                command("ip", "-n", name, "link", "set", link, "up")
            command("tc", "-n", name, "qdisc", "add", "dev", "wire", "root", *shape)
        return names

    yield make
    for name in names:  # with a namespace, its end of the wire goes, and with that the other end
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10)


def command(*words: str) -> None:
    """Run a command of iproute2, or skip the test with what it says."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    if done.returncode != 0:
        pytest.skip(f"`{' '.join(words)}` fails here: {done.stderr.strip()}")


@pytest.mark.parametrize(
    ("shape", "nbytes", "least"),
    [
        # There and back; and all bytes but the first burst at the rate.
        ("netem delay 20ms", 1, 2 * 0.020),
        ("tbf rate 80mbit burst 128kb limit 4mb", 2_000_000, (2_000_000 - 128 * 1024) / 10e6),
    ],
    ids=["latency", "bandwidth"],
)
def test_two_hosts_with_a_wire_between_them(namespaces, tmp_path, shape, nbytes, least):
    names = namespaces(*shape.split())
    results = tmp_path / "results.json"
    commands = [
        torchrun(
            *options,
            f"--local-addr=10.77.0.{number}",
            script="two_hosts.py",
            args=(results, nbytes),
            prefix=("ip", "netns", "exec", name),
        )
        for number, (name, options) in enumerate(zip(names, two_hosts("10.77.0.1", 29400, 1), strict=True), 1)
    ]
    done = finish(commands, GLOO_SOCKET_IFNAME="wire")
    assert [code for code, _ in done] == [0, 0], "\n".join(log for _, log in done)
    ranks = json.loads(results.read_text())
    assert [rank["hosts"] for rank in ranks] == [[0, 1]] * 2
    assert [rank["sum"] for rank in ranks] == [[0, 11, 22, 33]] * 2  # of 0, 1, 2, 3, times 1 and times 10
    assert least <= ranks[0]["seconds"] < 100 * least
