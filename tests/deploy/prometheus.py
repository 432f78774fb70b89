"""A real Prometheus for tests, and its tool: each is skipped by name where it is not installed."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest
import yaml

from tests.deploy.files import DEPLOY, read

PATIENCE = 60


def program(name):
    if shutil.which(name) is None:
        pytest.skip(f"no {name} on this machine")
    return name


def promtool(*words, folder=DEPLOY / "prometheus"):
    command = [program("promtool"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def expected_alerts(cases):
    """Names of alerts that a file of cases expects to fire somewhere, and to be silent somewhere."""
    fires, silent = set(), set()
    for case in yaml.safe_load(cases.read_text(encoding="utf-8"))["tests"]:
        for expected in case["alert_rule_test"]:
            (fires if expected["exp_alerts"] else silent).add(expected["alertname"])
    return fires, silent


def silenced(alert, name, cases, folder):
    """promtool's verdict on cases whose rules, deploy/prometheus/NAME, have one alert that never fires."""
    rules = read(f"prometheus/{name}")
    (rule,) = [rule for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == alert]
    rule["expr"] = f"({rule['expr']}) and on() vector(1) < 0"
    (folder / name).write_text(yaml.safe_dump(rules))
    content = yaml.safe_load(cases.read_text(encoding="utf-8")) | {"rule_files": [name]}
    (folder / "cases.yml").write_text(yaml.safe_dump(content))
    return promtool("test", "rules", "cases.yml", folder=folder)


class Prometheus:
    """One that runs, and answers instant queries."""

    def __init__(self, url, process):
        self.url, self.process = url, process

    def query(self, expression):
        """(labels, value) of each series."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=PATIENCE) as response:
            document = json.load(response)
        assert document["status"] == "success"
        return [(series["metric"], float(series["value"][1])) for series in document["data"]["result"]]

    def until(self, expression, value):
        """Ask until one series has this value."""
        give_up = time.monotonic() + PATIENCE
        while True:
            seen = self._asked(expression)
            if [number for _, number in seen] == [value]:
                return seen[0][0]
            assert self.process.poll() is None, "Prometheus has ended"
            assert time.monotonic() < give_up, f"{expression} is {seen}, not {value}"
            time.sleep(0.1)

    def _asked(self, expression):
        try:
            return self.query(expression)
        except OSError:  # it does not listen yet, or is not ready
            return []


@contextmanager
def prometheus(config, folder, *rules):
    """A real one on loopback.

    Args:
        config: content of prometheus.yml.
        folder: in which it keeps everything.
        rules: names of files beside the configurations of deploy/, copied into the folder if they are not there yet.
    """
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in rules:
        if not (folder / name).exists():
            shutil.copy(DEPLOY / "prometheus" / name, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = [program("prometheus"), *flags, f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()


def often(config):
    """The configuration, with scrapes and rules five times a second."""
    return config | {"global": dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "200ms")}
