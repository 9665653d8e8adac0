"""The files in deploy/ are consistent."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from veneer_server.config import ConfigInvalid, load_config
from veneer_server.telemetry.metrics import Metrics

from tests.packaging.dockerfile import parse
from tests.refused import refused

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
STAGES = parse((ROOT / "Dockerfile").read_text())


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
        for port in service.get("ports", ()):
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


def test_services_wait_for_health_that_is_checked() -> None:
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    checked = {name for name, service in composed.items() if "healthcheck" in service}
    if any(step.kind == "HEALTHCHECK" for step in STAGES[-1].steps):
        checked.add("veneer")
    waits = {
        name: needed
        for name, service in composed.items()
        for needed, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_healthy"
    }
    assert waits == {"prometheus": "veneer", "grafana": "prometheus"}
    assert set(waits.values()) <= checked


def test_the_container_writes_to_its_volume_and_tmp_alone() -> None:
    veneer = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["veneer"]
    last = STAGES[-1]
    (volume,) = last.one("VOLUME").words
    assert veneer["read_only"] is True
    assert veneer["tmpfs"] == ["/tmp"]
    writable = [each for each in veneer["volumes"] if not each.endswith(":ro")]
    assert writable == [f"veneer:{volume}"]
    variables = dict(pair for step in last.steps if step.kind == "ENV" for pair in step.pairs)
    assert variables["VENEER_DATA_DIR"].startswith(f"{volume}/")
    assert variables["VENEER_CACHE_DIR"].startswith(f"{volume}/")
    assert last.one("USER").text not in ("root", "0")


def test_the_container_serves_with_keys_and_tls_and_without_them_not_at_all(
    tmp_path: Path,
) -> None:
    """Its settings are parsed as they are at a start, and each published port is served."""
    veneer = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["veneer"]
    assert "command" not in veneer
    last = STAGES[-1]
    own = dict(pair for step in last.steps if step.kind == "ENV" for pair in step.pairs)
    config = load_config({}, own)
    assert not config.insecure
    addresses = (config.listen, config.openai_listen, config.metrics_listen)
    assert not any(address is None or address.loopback for address in addresses)
    exposed = {address.port for address in addresses if address is not None}
    assert {str(port) for port in exposed} == set(last.one("EXPOSE").words)
    assert {int(port.rpartition(":")[2]) for port in veneer["ports"]} < exposed
    for secret in ("VENEER_KEYS_FILE", "VENEER_TLS_CERT"):
        with refused(ConfigInvalid, needs="insecure"):
            load_config({}, {**own, secret: "", "VENEER_TLS_KEY": ""})


def test_secrets_are_mounted_as_a_folder_that_only_one_service_writes() -> None:
    """A single file that is mounted stays the old one when it is replaced."""
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    own = dict(pair for step in STAGES[-1].steps if step.kind == "ENV" for pair in step.pairs)
    for name in ("VENEER_KEYS_FILE", "VENEER_TLS_CERT", "VENEER_TLS_KEY"):
        assert own[name].startswith("/run/secrets/")
    mounts = {
        name: volume
        for name, service in composed["services"].items()
        for volume in service.get("volumes", ())
        if "/run/secrets" in volume
    }
    assert mounts == {"veneer": "keys:/run/secrets:ro", "setup": "keys:/run/secrets"}
    assert composed["services"]["setup"]["profiles"] == ["setup"]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for secret in composed["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "/deploy/secrets/" in ignored
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text())[
        "scrape_configs"
    ]
    asked = {job["authorization"]["credentials_file"], job["tls_config"]["ca_file"]}
    assert asked == {f"/run/secrets/{name}" for name in composed["secrets"]}
    assert set(composed["services"]["prometheus"]["secrets"]) == set(composed["secrets"])


def test_nothing_that_is_deployed_or_shown_is_insecure() -> None:
    """The flag is in the help and in what explains it, and in nothing to copy."""
    shown = [ROOT / "Dockerfile", *DEPLOY.rglob("*"), *(ROOT / "examples").rglob("*")]
    for file in shown:
        if (
            file.suffix in ("", ".yaml", ".yml", ".py", ".md", ".sh", ".toml")
            and file.is_file()
        ):
            assert "insecure" not in file.read_text("utf-8"), file


def test_what_the_image_copies_is_there_and_in_its_context() -> None:
    """A folder that the wheel is made of and that no COPY brings would fail the build."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        name for step in STAGES[0].steps if step.kind == "COPY" for name in step.words[:-1]
    }
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]["packages"]
    assert {package.partition("/")[0] for package in packages} < copied
