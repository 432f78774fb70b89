"""Two torchruns on one machine play two hosts of two ranks each."""

import json
import socket
import sys
from pathlib import Path

from minilib.mechanisms.replication import plans
from tests.ranks.launch.test_callers import finish, torchrun, two_hosts

SCRIPT = Path(__file__).with_name("collectives_on_two_hosts.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_levels_between_hosts_shared_memory_within_and_a_mesh_over_both(tmp_path):
    results = tmp_path / "results.json"
    commands = [
        torchrun(*options, "--local-addr=127.0.0.1", script=SCRIPT, args=(results,))
        for options in two_hosts("127.0.0.1", free_port(), 2)
    ]
    done = finish(commands, GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
    assert [code for code, _ in done] == [0, 0], "\n".join(log for _, log in done)
    ranks = json.loads(results.read_text())
    assert len(ranks) == 4
    plan = plans.two_level([0, 0, 1, 1])
    for rank, found in enumerate(ranks):
        assert found["hosts"] == [0, 0, 1, 1]
        assert found["sum"] == [0, 1111, 2222, 3333]
        assert found["two-level"] == found["shared"] == [True] * 3
        assert found["two-level, same bits"]
        partners = {"dp": 10**rank + 10 ** ((rank + 2) % 4), "tp": 11 if rank < 2 else 1100}
        assert found["mesh"] == {"dp": [partners["dp"], 2 * 2 * 8], "tp": [partners["tp"], 0]}
        sizes = [[4 * (numel // 4 + (chunk < numel % 4)) for chunk in range(4)] for numel in (1, 101, 300_001, 1001)]
        assert found["two-level, bytes"] == sum(plan.bytes_sent(rank, chunks) for chunks in sizes)
