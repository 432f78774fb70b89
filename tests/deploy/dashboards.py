"""Expressions of the dashboards in deploy/grafana, with their variables filled in."""

import json

from tests.deploy.files import DEPLOY

FOLDER = DEPLOY / "grafana"
NAMES = ("training", "serving")
VARIABLES = {"$__rate_interval": "5m", "$run": "tiny", "$instance": ".*"}


def dashboard(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def expressions(name, **variables):
    """PromQL of every panel, as Grafana would send it."""
    found = []
    for panel in dashboard(name)["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            for variable, value in (VARIABLES | {f"${key}": value for key, value in variables.items()}).items():
                text = text.replace(variable, value)
            found.append(text)
    return found
