"""The image and the compose file. No image is built here: what it would run is parsed, and run without a container."""

import json
import os
import shlex
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from minilib.numbers.records import ROOT
from tests.deploy.files import CLOSE_SECONDS, DEPLOY, CommandRefused, dockerfile, exec_form, parsed, read

SERVICES = read("compose.yaml")["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"].startswith("minilib"))
REPLICAS = [name for name in OURS if name.startswith("replica")]


def copied():
    """Files and folders that the build takes from the repository."""
    lines = [rest.split() for word, rest in dockerfile() if word == "COPY"]
    return [source for words in lines if not words[0].startswith("--from") for source in words[:-1]]


def seconds(text):
    number, unit = text[:-1], text[-1]
    return float(number) * {"s": 1, "m": 60}[unit]


# The image


def test_every_file_that_is_copied_is_there_and_not_ignored():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*", "nothing goes to the builder but what is named"
    named = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert set(copied()) == named and len(named) >= 5
    assert all((ROOT / source).exists() for source in named)


def test_bases_are_pinned_by_version():
    bases = [rest.split()[0] for word, rest in dockerfile() if word == "FROM"]
    images = [*bases, *(service["image"] for service in SERVICES.values())]
    for image in images:
        _, colon, tag = image.partition(":")
        assert colon and tag != "latest" and any(character.isdigit() for character in tag), image
    assert len(set(bases)) == 1, "what was built with one Python must run with the same"


def test_the_program_is_started_without_a_shell_and_as_no_root():
    assert exec_form("ENTRYPOINT") == ["python", "-m"]
    module, options = parsed(exec_form("CMD"))
    assert module == "minilib.serving.server" and options.host == "0.0.0.0"
    words = [word for word, _ in dockerfile()]
    (user,) = [rest for word, rest in dockerfile() if word == "USER"]
    assert int(user) > 0, "Kubernetes' runAsNonRoot can only tell from a number"
    assert words.index("USER") < words.index("CMD")
    (port,) = [rest for word, rest in dockerfile() if word == "EXPOSE"]
    assert int(port) == options.port


def health_check():
    (line,) = [rest for word, rest in dockerfile() if word == "HEALTHCHECK"]
    return json.loads(line.partition("CMD ")[2])


@pytest.mark.parametrize(
    "check", [health_check(), SERVICES[REPLICAS[0]]["healthcheck"]["test"][1:]], ids=["image", "compose"]
)
def test_health_checks_see_a_server_and_its_end(check, server):
    """The command itself, with the server's port in place of the container's."""
    here = [sys.executable, *(word.replace("127.0.0.1:8000", f"{server.host}:{server.port}") for word in check[1:])]
    assert check[0] == "python" and here[1:] != check[1:]
    subprocess.run(here, check=True, timeout=60, capture_output=True)
    nobody = [word.replace(f"{server.host}:{server.port}", f"{server.host}:1") for word in here]
    ended = subprocess.run(nobody, timeout=60, capture_output=True)
    assert ended.returncode == 1 and b"refused" in ended.stderr


def test_what_is_copied_is_enough_for_both_programs(tmp_path):
    for source in ("minilib", "constraints.txt"):
        (tmp_path / source).symlink_to(ROOT / source)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for module in ("minilib.serving.server", "minilib.serving.router"):
        command = [sys.executable, "-m", module, "--help"]
        said = subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=120, capture_output=True, text=True)
        assert "--port" in said.stdout


# The compose file


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_of_the_program(name):
    module, options = parsed(SERVICES[name]["command"])
    assert module == f"minilib.serving.{'router' if name == 'router' else 'server'}"
    assert options.host == "0.0.0.0"
    with pytest.raises(CommandRefused, match="--no-such-flag"):
        parsed([*SERVICES[name]["command"], "--no-such-flag"])


def test_two_replicas_with_names_of_their_own():
    names = [parsed(SERVICES[name]["command"])[1].name for name in REPLICAS]
    assert names == REPLICAS and len(REPLICAS) == 2


def test_the_router_knows_every_replica_and_waits_until_it_is_ready():
    router = SERVICES["router"]
    urls = [urlsplit(url) for url in parsed(router["command"])[1].replica]
    ports = {name: parsed(SERVICES[name]["command"])[1].port for name in REPLICAS}
    assert {url.hostname: url.port for url in urls} == ports
    assert router["depends_on"] == {name: {"condition": "service_healthy"} for name in REPLICAS}
    assert all(SERVICES[name]["healthcheck"]["test"][0] == "CMD" for name in REPLICAS)


@pytest.mark.parametrize("name", OURS)
def test_compose_waits_longer_than_a_drain(name):
    options = parsed(SERVICES[name]["command"])[1]
    drain = options.drain if name == "router" else options.drain_seconds
    assert seconds(SERVICES[name]["stop_grace_period"]) >= drain + CLOSE_SECONDS


@pytest.mark.parametrize("name", OURS)
def test_containers_may_write_to_memory_alone(name):
    assert SERVICES[name]["read_only"] and SERVICES[name]["tmpfs"] == ["/tmp"]


def test_only_the_host_itself_reaches_the_published_ports():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert SERVICES["router"]["ports"] == [f"127.0.0.1:8000:{parsed(SERVICES['router']['command'])[1].port}"]


def test_volumes_are_there():
    mounts = [volume.split(":") for volume in SERVICES["prometheus"]["volumes"]]
    for source, *_ in mounts:
        assert (DEPLOY / source).is_dir() if source.startswith(".") else source in read("compose.yaml")["volumes"]
    (config,) = [word for word in SERVICES["prometheus"]["command"] if word.startswith("--config.file=")]
    inside = config.partition("=")[2].removeprefix("/etc/prometheus/")
    assert (DEPLOY / "prometheus" / inside).is_file()


def test_the_published_specification():
    """By an implementation of compose-spec, which takes no YAML with merge keys, hence JSON."""
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    text = json.dumps(read("compose.yaml"))
    assert set(compose_spec.PyCompose.from_json(text).service_names()) == SERVICES.keys()
    for right, wrong in (("depends_on", "depend_on"), ("service_healthy", "service_health"), ('"75s"', '"75"')):
        assert right in text
        with pytest.raises(ValueError):
            compose_spec.PyCompose.from_json(text.replace(right, wrong))


def test_readme_shows_commands_that_are_taken():
    lines = (DEPLOY / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [shlex.split(line.partition("python -m ")[2]) for line in lines if line.startswith("python -m minilib.")]
    assert len(commands) >= 3
    assert {parsed(command)[0] for command in commands} == {"minilib.serving.server", "minilib.serving.router"}
