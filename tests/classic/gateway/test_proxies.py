"""The comparison with nginx and HAProxy: counts that hold of each of them, and nothing that is left running."""

import shutil

import psutil
import pytest

from minilib.classic.gateway.experiment import (
    TROUBLES,
    compare_proxies,
    connections_for,
    cut_short,
    left_behind,
    moved_away,
    sent_again,
    setups,
    slow_heads,
    streamed,
)
from minilib.classic.gateway.proxies import real_proxy
from tests.classic.http.http_cases import run

pytestmark = pytest.mark.filterwarnings("error")
NAMES = ["nobody", "gateway", "gateway, held", "nginx", "nginx, HTTP/1.1", "nginx, unbuffered", "nginx, HTTP/1.1, gzip",
         "haproxy", "haproxy, no delay"]  # fmt: skip
PLAIN = ["gateway", "nginx", "haproxy"]


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert not [child for child in psutil.Process().children() if child.name() in ("nginx", "haproxy")]


def there(names):
    """Those of these setups that can run here; the others skip the test by name if they are all that it is about."""
    here = [name for name in names if name in setups()]
    if not here:
        pytest.skip(f"needs {' or '.join(names)}")
    return here


@pytest.mark.parametrize(
    "names, comes_at_once",
    [(["nobody", "gateway"], True), (["gateway, held"], False), (["nginx"], False), (["nginx, HTTP/1.1"], True),
     (["nginx, unbuffered"], True), (["nginx, HTTP/1.1, gzip"], False), (["haproxy"], False),
     (["haproxy, no delay"], True)],
    ids=str,
)  # fmt: skip
def test_who_passes_the_first_chunk_on_before_the_second_is_made(names, comes_at_once):
    for name, said in compare_proxies(streamed, there(names)).items():
        assert said.status == 200 and said.proper
        first = said.made[0]
        assert (first <= 2) if comes_at_once else (first == 6), f"{name}: {said.made}"


@pytest.mark.parametrize("name, opened", [("nobody", 8), ("gateway", 0), ("nginx", 8), ("nginx, HTTP/1.1", 0)])
def test_connections_to_a_backend(name, opened):
    assert compare_proxies(connections_for, there([name])) == {name: opened}


SEEN = {  # backends of three that see a GET, and a POST
    "refuses connections": {"gateway": (1, 1), "nginx": (1, 1), "haproxy": (0, 0)},
    "closes, request unread": {"gateway": (3, 1), "nginx": (3, 1), "haproxy": (1, 1)},
    "closes, request read": {"gateway": (3, 1), "nginx": (3, 1), "haproxy": (1, 1)},
    "says 503": {"gateway": (3, 3), "nginx": (1, 1), "haproxy": (1, 1)},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_who_sends_what_again(trouble):
    names = there(PLAIN)
    for place, method in enumerate(("GET", "POST")):
        seen = compare_proxies(lambda name, method=method: sent_again(name, method, TROUBLES[trouble]), names)
        expected = {name: SEEN[trouble][name][place] for name in names}
        assert {name: count for name, (count, _) in seen.items()} == expected, method


def test_who_tells_that_a_response_was_cut():
    assert all(told for told, _ in compare_proxies(cut_short, there(NAMES)).values()), "chunks say so to everybody"
    told = {
        name: told for name, (told, _) in compare_proxies(lambda name: cut_short(name, b"1.0"), there(PLAIN)).items()
    }
    assert told == {name: name == "gateway" for name in told}, "HTTP/1.0 has no chunks: only a reset says so"


def test_who_tells_the_backend_that_its_client_left():
    found = compare_proxies(left_behind, there([name for name in NAMES if name not in ("nginx", "gateway, held")]))
    assert all(told for told, _ in found.values())
    found = compare_proxies(left_behind, there(["nginx", "gateway, held"]))
    assert {made for _, made in found.values()} == {80}, "who holds the response learns it at the end"


def test_streams_go_on_when_backends_are_exchanged():
    found = compare_proxies(moved_away, there(["gateway", "nginx", "nginx, HTTP/1.1", "haproxy"]))
    assert set(found.values()) == {(True, True)}


def test_slow_heads_are_closed_and_not_everybody_is_told():
    found = compare_proxies(slow_heads, there(PLAIN))
    assert found == {name: (5, 0 if name == "nginx" else 5) for name in found}


def test_what_is_not_there_is_said():
    async def main():
        with pytest.raises(RuntimeError, match="no-such-proxy is not installed"):
            async with real_proxy("no-such-proxy", [1]):
                pass
        if shutil.which("nginx"):
            with pytest.raises(RuntimeError, match="nginx did not start: .*nonsense"):
                async with real_proxy("nginx", [1], {"location": "nonsense;"}):
                    pass

    run(main)
    with pytest.raises(KeyError, match="no setup"):
        compare_proxies(streamed, ["nobody", "somebody"])
