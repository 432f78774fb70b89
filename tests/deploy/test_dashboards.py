"""Dashboards: promtool parses every expression, every metric is exported, and Grafana's provisioning fits together."""

import re

import pytest
import yaml

from tests.deploy.dashboards import FOLDER, NAMES, dashboard, expressions
from tests.deploy.files import read
from tests.deploy.prometheus import promtool
from tests.deploy.test_training_alerts import RULES, exported

NAME = re.compile(r"\b(?:training|minilib|router)[_:][\w:]+")


@pytest.mark.parametrize("name", NAMES)
def test_promtool_parses_every_expression(name, tmp_path):
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions(name))]
    assert len(rules) >= 12 and "$" not in str(rules)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": name, "rules": rules}]}))
    checked = promtool("check", "rules", "rules.yml", folder=tmp_path)
    assert checked.returncode == 0 and f"{len(rules)} rules found" in checked.stdout, checked.stdout + checked.stderr


def test_metrics_of_the_training_dashboard_are_exported_or_recorded():
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    named = set(NAME.findall("\n".join(expressions("training"))))
    assert len(named) == 17 and named <= exported() | recorded and recorded <= named


def test_metrics_of_the_serving_dashboard_are_served(served_metrics, router_metrics):
    named = set(NAME.findall("\n".join(expressions("serving"))))
    assert len(named) >= 12 and named <= served_metrics.keys() | router_metrics


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_beside_each_other_and_say_what_they_show(name):
    panels, taken = dashboard(name)["panels"], set()
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
    assert len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("name", NAMES)
def test_variables_of_expressions_are_those_of_the_dashboard(name):
    board = dashboard(name)
    used = {each for panel in board["panels"] for target in panel["targets"] for each in NAMED.findall(target["expr"])}
    assert used - {"__rate_interval"} == {variable["name"] for variable in board["templating"]["list"]}


NAMED = re.compile(r"\$(\w+)")


def sources(node):
    """Every data source that a dashboard names anywhere."""
    if isinstance(node, dict):
        yield from ([node["datasource"]["uid"]] if "datasource" in node else [])
        node = node.values()
    if not isinstance(node, str | int | None):
        for each in node:
            yield from sources(each)


def test_grafana_finds_its_dashboards_and_they_their_source():
    (source,) = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    services = read("compose.yaml")["services"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    for name in NAMES:
        assert set(sources(dashboard(name))) == {source["uid"]}
    (provider,) = read("grafana/provisioning/dashboards/minilib.yml")["providers"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in services["grafana"]["volumes"])
    inside = {f"./grafana/{name}.json": f"{provider['options']['path']}/{name}.json" for name in NAMES}
    assert mounts == {"./grafana/provisioning": "/etc/grafana/provisioning"} | inside
    assert all((FOLDER.parent / path).exists() for path in mounts)
