"""Alerts of a training job, by Prometheus' own tools; and a real Prometheus that scrapes a real run of two ranks."""

import json
import re
import threading
import urllib.request

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from minilib.operations.metrics.job_metrics import JobMetrics
from minilib.operations.metrics.rank_metrics import RankMetrics
from minilib.ranks.launch import run
from tests.deploy.dashboards import expressions
from tests.deploy.files import DEPLOY, read
from tests.deploy.prometheus import PATIENCE, expected_alerts, often, program, prometheus, promtool, silenced
from tests.operations.metrics.runs import train_until

RULES = [rule for group in read("prometheus/training-alerts.yml")["groups"] for rule in group["rules"]]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]
CASES = DEPLOY.parent / "tests/deploy/training_alert_cases.yml"


def exported():
    """Names of series that a rank and a job bring."""
    metrics = RankMetrics("tiny", durable=0.0, queue_depth=lambda: 0)
    JobMetrics(metrics, 1.0, 1.0, started=0.0).step_ended(1, 1, 1)
    metrics.step_ended(1, 1.0, 1.0, 1.0, 1.0, 1.0)
    text = generate_latest(metrics.registry).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_promtool_takes_the_configuration():
    checked = promtool("check", "config", "prometheus-training.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_alerts_ask_for_metrics_that_are_exported():
    text = "\n".join(rule["expr"] for rule in RULES)
    named = set(re.findall(r"\btraining_\w+", text))
    assert len(named) >= 15 and named <= exported()


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not():
    fires, silent = expected_alerts(CASES)
    assert fires == silent == set(ALERTS) and len(ALERTS) == len(set(ALERTS))


def test_alerts_fire_when_they_should():
    tested = promtool("test", "rules", str(CASES))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_the_tests_of_alerts_see_an_alert_that_never_fires(alert, tmp_path):
    tested = silenced(alert, "training-alerts.yml", CASES, tmp_path)
    assert tested.returncode == 1 and f"alertname: {alert}" in tested.stdout + tested.stderr


# A real run


def quickened(rules):
    """The rules with every minute a second, and those of a thousand seconds or more as many sixtieths."""
    text = re.sub(r"\b(\d+)m\b", r"\1s", yaml.safe_dump(rules))
    return yaml.safe_load(re.sub(r"> (\d+00|60)\b", lambda found: f"> {int(found[1]) / 60:g}", text))


def test_rules_are_quickened_and_otherwise_the_same():
    before, after = (
        {rule.get("alert"): rule for group in rules["groups"] for rule in group["rules"]}
        for rules in (read("prometheus/training-alerts.yml"), quickened(read("prometheus/training-alerts.yml")))
    )
    assert "> 60\n" in before["TrainingHangs"]["expr"] and "> 1\n" in after["TrainingHangs"]["expr"]
    assert "> 1800" in before["TrainingHangs"]["expr"] and "> 30" in after["TrainingHangs"]["expr"]
    assert (before["StragglingRank"]["for"], after["StragglingRank"]["for"]) == ("5m", "5s")
    assert before.keys() == after.keys() and before["MfuImpossible"]["expr"] == after["MfuImpossible"]["expr"]


@pytest.mark.parametrize(("fault", "alert"), [("hang", "TrainingHangs"), ("poison", "LossNotFinite")])
def test_a_real_prometheus_sees_the_fault_of_a_real_run(fault, alert, tmp_path):
    """Two ranks train; no such alert is there; one rank has a fault; the alert fires."""
    program("prometheus")
    stop, wrong, targets = tmp_path / "stop", tmp_path / "fault", tmp_path / "targets"
    targets.mkdir()
    rules = quickened(read("prometheus/training-alerts.yml"))
    (tmp_path / "training-alerts.yml").write_text(yaml.safe_dump(rules))
    config = often(read("prometheus/prometheus-training.yml"))
    config["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "200ms"
    taken = []
    job = threading.Thread(
        target=lambda: taken.extend(run(train_until, 2, str(stop), str(targets), str(wrong), timeout=3 * PATIENCE))
    )
    job.start()
    firing = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
    try:
        with prometheus(config, tmp_path, "training-alerts.yml") as found:
            found.until('count(training_running{run="tiny"} == 1)', 2)
            found.until("count(training_steps_total > 20)", 2)
            assert {labels["instance"] for labels, _ in found.query("up")} == {"tiny/0", "tiny/1"}
            assert found.query("training_mfu_ratio") and found.query("training_goodput_ratio")
            found.until("count(training:work_seconds:rate5m)", 2)
            empty = [text for text in expressions("training", __rate_interval="5s") if not found.query(text)]
            assert empty == ['training_data_queue_depth{run="tiny"}'], "this trainer prefetches nothing"
            assert not found.query(firing)
            wrong.write_text(fault)
            labels = found.until(firing, 1)
            assert labels["run"] == "tiny" and labels["severity"] == "page"
            with urllib.request.urlopen(f"{found.url}/api/v1/rules", timeout=PATIENCE) as response:
                (group,) = json.load(response)["data"]["groups"]
            assert {rule["health"] for rule in group["rules"]} == {"ok"}
            stop.touch()
            job.join(PATIENCE)
            found.until("count(up) or vector(0)", 0)
    finally:
        stop.touch()
        job.join(PATIENCE)
    assert len(taken) == 2 and taken[0] == taken[1] > 20 and not list(targets.iterdir())
