"""Helm, in a process of its own: the library that binds it brings Go's runtime along.

Nothing is asked over the network: rendering and linting read the chart's folder only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "veneer"
RELEASE = "veneer"
NAMESPACE = "llm"

VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    **{
        file.name.removesuffix("-values.yaml"): yaml.safe_load(file.read_text("utf-8"))
        for file in sorted((CHART / "ci").glob("*-values.yaml"))
    },
}
"""The values files that the chart is tested with."""


@dataclass(frozen=True)
class Rendered:
    """What Helm made of one chart and values.

    Attributes:
        objects: all Kubernetes objects.
        notes: NOTES.txt.
        lint: messages of `helm lint --strict` that are not just information.
        error: why it refused; "" if it did not.
    """

    objects: tuple[dict[str, Any], ...]
    notes: str
    lint: tuple[str, ...]
    error: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The objects of one kind."""
        return [each for each in self.objects if each["kind"] == kind]


def render(cases: Mapping[str, tuple[Path, dict[str, Any]]]) -> dict[str, Rendered]:
    """Render charts with values, all by one process. Cases: name -> (chart, values)."""
    asked = {name: (str(chart), values) for name, (chart, values) in cases.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chart.render"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: _read(told) for name, told in json.loads(done.stdout).items()}


def _read(told: dict[str, Any]) -> Rendered:
    objects: list[dict[str, Any]] = []
    for path, text in sorted(told["files"].items()):
        if not path.endswith("NOTES.txt"):
            objects += [each for each in yaml.safe_load_all(text) if each]
    notes = "".join(t for path, t in told["files"].items() if path.endswith("NOTES.txt"))
    return Rendered(tuple(objects), notes, tuple(told["lint"]), told["error"])


def _main() -> None:
    import helm_python as helm

    found: dict[str, Any] = {}
    for name, (path, values) in json.load(sys.stdin).items():
        files: dict[str, str] = {}
        error = ""
        try:
            with helm.Chart.load(path) as chart:
                chart.validate_schema(values)
                files = chart.render(values, name=RELEASE, namespace=NAMESPACE)
        except helm.HelmError as refused:
            error = str(refused)
        report = helm.lint(path, values, strict=True, namespace=NAMESPACE)
        lint = [m["error"] for m in report["messages"] if m["severity"] > 1]
        found[name] = {"files": files, "lint": lint + report["errors"], "error": error}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
