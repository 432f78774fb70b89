"""Alerts and scrape configurations, by Prometheus' own tools; and a real Prometheus that scrapes a server."""

import json
import re
import shutil
import urllib.request

import pytest
import yaml

from tests.deploy.files import DEPLOY, metrics_named_in, parsed, read
from tests.deploy.prometheus import PATIENCE, expected_alerts, often, prometheus, promtool, silenced
from tests.deploy.test_kubernetes import DEPLOYMENTS, pod_of

RULES = [rule for group in read("prometheus/alerts.yml")["groups"] for rule in group["rules"]]
CASES = DEPLOY.parent / "tests/deploy/alert_cases.yml"


def labels_of(name):
    """Labels that Kubernetes' discovery would give to a pod of a deployment."""
    metadata, prefix = pod_of(name)["metadata"], "__meta_kubernetes_"
    found = {f"{prefix}pod_ip": "127.0.0.1", f"{prefix}namespace": "serving", f"{prefix}pod_name": f"{name}-abc"}
    for kind in ("annotation", "label"):
        for key, value in metadata[f"{kind}s"].items():
            found[f"{prefix}pod_{kind}_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}"] = value
    return found


# Configuration


def test_promtool_takes_the_configuration_of_compose():
    checked = promtool("check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_promtool_takes_the_configuration_of_kubernetes(tmp_path):
    """With a list in place of Kubernetes' discovery, which some builds of Prometheus leave out, as Debian's does."""
    config = read("prometheus/prometheus-kubernetes.yml")
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = [{"targets": ["nowhere:1"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "prometheus/alerts.yml", tmp_path)
    checked = promtool("check", "config", "prometheus.yml", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_of_compose_scrapes_every_program():
    jobs = {
        job["job_name"]: job["static_configs"][0]["targets"]
        for job in read("prometheus/prometheus.yml")["scrape_configs"]
    }
    services = read("compose.yaml")["services"]
    ours = {
        name: parsed(service["command"])[1].port for name, service in services.items() if "minilib" in service["image"]
    }
    assert {target for targets in jobs.values() for target in targets} == {
        f"{name}:{port}" for name, port in ours.items()
    }
    assert jobs.keys() == {"replicas", "router"}


# Alerts


def test_alerts_ask_for_metrics_that_are_served(served_metrics, router_metrics):
    text = (DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8")
    named = metrics_named_in(text)
    assert len(named) >= 7 and named <= served_metrics.keys()
    assert set(re.findall(r"\brouter_\w+", text)) <= router_metrics and "router_replica_ready" in router_metrics


def test_alerts_ask_for_labels_that_are_served(server, served_metrics):
    """`le="1"` would be no label of any bucket, and an alert on it would never fire."""
    text = server.ask("/metrics")[2].decode()
    for rule in RULES:
        for metric, label, value in re.findall(r'(\w+)\{(le)="([^"]+)"', rule["expr"]):
            assert f'{metric}{{{label}="{value}"}}' in text
    assert 'path="/v1/completions",status="200"' in text


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not():
    fires, silent = expected_alerts(CASES)
    assert fires == silent == {rule["alert"] for rule in RULES}


def test_alerts_fire_when_they_should():
    tested = promtool("test", "rules", str(CASES))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_the_tests_of_alerts_see_an_alert_that_never_fires(alert, tmp_path):
    tested = silenced(alert, "alerts.yml", CASES, tmp_path)
    assert tested.returncode == 1 and f"alertname: {alert}" in tested.stdout + tested.stderr


# A real Prometheus


def test_a_real_prometheus_counts_what_was_sent(server, tmp_path):
    """Through the rules that give a pod its address and its labels; only the discovery of pods is a list here."""
    config = often(read("prometheus/prometheus-kubernetes.yml"))
    (job,) = config["scrape_configs"]
    del job["kubernetes_sd_configs"]
    port = {"__meta_kubernetes_pod_annotation_prometheus_io_port": str(server.port)}
    job["static_configs"] = [
        {"targets": ["nowhere:1"], "labels": labels_of("replicas") | port},
        {"targets": ["nowhere:2"], "labels": {"__meta_kubernetes_pod_ip": "127.0.0.1"}},  # a pod without annotations
    ]
    with prometheus(config, tmp_path, "alerts.yml") as found:
        labels = found.until("minilib_ready", 1)
        assert labels["job"] == "replicas" and labels["instance"] == f"{server.host}:{server.port}"
        assert (labels["namespace"], labels["pod"]) == ("serving", "replicas-abc")
        assert len(found.query("up")) == 1
        before = {
            name: server.metric(name) for name in ("minilib_generation_tokens_total", "minilib_http_requests_total")
        }
        good = 'minilib_http_requests_total{path="/v1/completions", status="200"}'
        bad = 'minilib_http_requests_total{path="/v1/completions", status="404"}'
        sent = sum(value for _, value in found.query(good))
        for _ in range(3):
            body = {"model": "tiny", "prompt": "def f(", "max_tokens": 5, "ignore_eos": True}
            assert server.ask("/v1/completions", body)[0] == 200
        for _ in range(2):
            assert server.ask("/v1/completions", {"model": "another", "prompt": "x"})[0] == 404
        found.until(good, sent + 3)
        found.until(bad, 2)
        found.until("minilib_generation_tokens_total", before["minilib_generation_tokens_total"] + 15)
        rules = found.url + "/api/v1/rules"
        with urllib.request.urlopen(rules, timeout=PATIENCE) as response:
            (group,) = json.load(response)["data"]["groups"]
        assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in RULES]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


def test_annotations_name_the_port_of_the_program():
    for name in DEPLOYMENTS:
        template = pod_of(name)
        (container,) = template["spec"]["containers"]
        annotations = template["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert int(annotations["prometheus.io/port"]) == parsed(container["args"])[1].port
