"""What lies in deploy/ fits together."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from veneer_server.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def dashboard() -> Any:
    """The module that writes the dashboard."""
    path = DEPLOY / "grafana" / "dashboard.py"
    spec = importlib.util.spec_from_file_location("veneer_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_is_what_its_program_writes(dashboard: Any) -> None:
    assert dashboard.TARGET.read_text() == dashboard.build(), "run `make dashboard`"


def test_panels_do_not_overlap_and_have_units(dashboard: Any) -> None:
    panels = json.loads(dashboard.build())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"]


def test_alerts_and_dashboard_read_metrics_that_exist(dashboard: Any) -> None:
    """A renamed metric would leave an empty panel and an alert that cannot fire."""
    metrics = Metrics()
    known = {"up"}
    for family in metrics.registry.collect():
        known |= {family.name, f"{family.name}_total"}
        known |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text()
    used = set(re.findall(r"\b(?:veneer|grpc)_\w+", rules + dashboard.build()))
    recorded = {
        part
        for group in yaml.safe_load(rules)["groups"]
        for rule in group["rules"]
        if "record" in rule
        for part in re.findall(r"veneer_\w+", rule["record"])
    }
    assert used - known - recorded - {"grpc_code"} == set()


def test_compose_mounts_what_there_is() -> None:
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in composed["services"].values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in composed["volumes"] or (DEPLOY / source).exists()
    prometheus, compose = (
        yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
        for name in ("prometheus.yml", "compose.yml")
    )
    (job,) = compose["scrape_configs"]
    (target,) = job["static_configs"]
    assert target["targets"] == ["veneer:9095"]
    assert prometheus["rule_files"] == compose["rule_files"]
