"""The Helm chart, as Helm renders it: valid, consistent, accepted by the server's parser."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from veneer_server.config import OPTIONS

from tests.chart.check import NEWEST, OLDEST, problems, valid
from tests.chart.pods import Pod, pods_of
from tests.chart.render import CHART, VALUES, Rendered, render

pytestmark = pytest.mark.push

REFUSED: dict[str, dict[str, Any]] = {
    "an unknown value": {"engine": {"replica": 3}},
    "a value of the wrong type": {"ports": {"grpc": "50051"}},
    "a mode that there is not": {"mode": "cluster"},
    "a flag that the chart sets itself": {"flags": {"listen": "0.0.0.0:1"}},
    "a flag that would open the server": {"server": {"flags": {"insecure": True}}},
    "a scrape without a key": {"metrics": {"serviceMonitor": {"enabled": True}}},
    "a pool without a picker": {"inferencePool": {"enabled": True}},
    "engines without a key for the registry": {"mode": "replicated"},
    "client certificates without an authority": {"tls": {"clients": {"enabled": True}}},
}
"""Values that Helm must refuse, rather than install something that does not work."""

PLANTED: dict[str, tuple[str, str, str, str]] = {
    "a Service that chooses nothing": (
        "services.yaml",
        'include "veneer.selector" $serving',
        'include "veneer.labels" $serving',
        "default",
    ),
    "a budget of another workload": (
        "policies.yaml",
        'include "veneer.selector" $args | nindent 6',
        'include "veneer.selector" (dict "root" $root "component" "engine") | nindent 6',
        "replicated",
    ),
    "a policy that forgets a port": (
        "policies.yaml",
        "- {port: {{ $root.Values.ports.http }}, protocol: TCP}",
        "",
        "default",
    ),
    "a port that is not the server's": (
        "_pod.tpl",
        "{name: http, containerPort: {{ $v.ports.http }}, protocol: TCP}",
        "{name: http, containerPort: 8001, protocol: TCP}",
        "default",
    ),
    "a targetPort of no container": (
        "services.yaml",
        "targetPort: metrics",
        "targetPort: prometheus",
        "default",
    ),
    "a flag that there is not": (
        "_pod.tpl",
        '"--log-format=json"',
        '"--log-as=json"',
        "default",
    ),
    "a value that no flag takes": (
        "_pod.tpl",
        "--metrics-names=%s",
        "--metrics-names=%ss",
        "default",
    ),
    "a field that Kubernetes has not": (
        "_pod.tpl",
        "automountServiceAccountToken: false",
        "automountServiceToken: false",
        "default",
    ),
    "a root that is written to": (
        "_pod.tpl",
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        "default",
    ),
    "a drain that is cut short": (
        "_helpers.tpl",
        "add .Values.drain.preStopSeconds .Values.drain.graceSeconds 15",
        "add .Values.drain.graceSeconds 0",
        "everything",
    ),
    "a gRPC probe of a server with TLS": (
        "_probes.tpl",
        "{{- if not $v.tls.enabled -}}",
        "{{- if true -}}",
        "default",
    ),
    "a liveness that waits for the base": (
        "_probes.tpl",
        '"path" "/livez"',
        '"path" "/health"',
        "default",
    ),
    "keys in a variable": (
        "_pod.tpl",
        "      ports:\n",
        "      env: [{name: VENEER_API_KEY, valueFrom: {secretKeyRef: {name: a, key: b}}}]\n"
        "      ports:\n",
        "default",
    ),
    "a key file that everybody may read": ("_pod.tpl", "0440", "0444", "default"),
    "keys that are not where they are mounted": (
        "_pod.tpl",
        "mountPath: /run/secrets/keys",
        "mountPath: /run/keys",
        "default",
    ),
    "a scrape without TLS": (
        "servicemonitor.yaml",
        "scheme: https",
        "scheme: http",
        "tls-and-keys",
    ),
    "a scrape of pods twice": (
        "servicemonitor.yaml",
        "- {key: veneer.dev/headless, operator: DoesNotExist}",
        "[]",
        "tls-and-keys",
    ),
    "a pool whose metrics have other names": (
        "_helpers.tpl",
        'ternary "vllm" .Values.metrics.names .Values.inferencePool.enabled',
        'print "veneer"',
        "everything",
    ),
    "replicas beside an autoscaler": (
        "engine.yaml",
        "{{- if not .Values.engine.autoscaling.enabled }}",
        "{{- if true }}",
        "everything",
    ),
}
"""Mistakes in a template: file, what is replaced, by what, and the values that show it."""


@pytest.fixture(scope="module")
def charts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rendered]:
    """All cases, rendered by one process."""
    cases: dict[str, tuple[Path, dict[str, Any]]] = {
        name: (CHART, values) for name, values in VALUES.items()
    }
    for name, values in REFUSED.items():
        cases[name] = (CHART, values)
    for number, (name, (file, old, new, values)) in enumerate(PLANTED.items()):
        chart = tmp_path_factory.mktemp("chart") / str(number) / "veneer"
        shutil.copytree(CHART, chart)
        template = chart / "templates" / file
        text = template.read_text("utf-8")
        assert old in text, name
        template.write_text(text.replace(old, new), "utf-8")
        cases[name] = (chart, VALUES[values])
    return render(cases)


def pod(rendered: Rendered, component: str) -> Pod:
    (found,) = (p for p in pods_of(list(rendered.objects)) if p.component == component)
    return found


@pytest.mark.push
@pytest.mark.parametrize("values", VALUES)
def test_what_helm_renders_is_valid_and_fits_together(
    charts: dict[str, Rendered], values: str
) -> None:
    rendered = charts[values]
    assert rendered.error == ""
    assert problems(list(rendered.objects)) == []
    assert rendered.lint == ()
    assert "kubectl --namespace llm rollout status" in rendered.notes
    waits = "The pods wait until they exist" in rendered.notes
    assert waits == ("Required Secret" in rendered.notes)


def test_it_is_valid_for_the_oldest_kubernetes_that_it_promises(
    charts: dict[str, Rendered],
) -> None:
    promised = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["kubeVersion"]
    assert promised == f">={OLDEST}.0-0"
    assert OLDEST != NEWEST
    for values in VALUES:
        assert list(valid(list(charts[values].objects), OLDEST)) == []


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(charts: dict[str, Rendered], mistake: str) -> None:
    rendered = charts[mistake]
    found = problems(list(rendered.objects)) if not rendered.error else [rendered.error]
    assert found != []


@pytest.mark.parametrize("values", REFUSED)
def test_values_that_cannot_work_are_refused(charts: dict[str, Rendered], values: str) -> None:
    assert charts[values].error != ""


def test_by_itself_it_is_one_closed_server_on_a_volume(charts: dict[str, Rendered]) -> None:
    kinds = sorted(each["kind"] for each in charts["default"].objects)
    assert kinds == [
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "Service",
        "ServiceAccount",
        "StatefulSet",
    ]
    server = pod(charts["default"], "server")
    config = server.config()
    assert not config.insecure
    assert config.keys_file is not None
    assert config.tls_cert is not None
    assert "role" not in server.flags, "the server's default is all of it"


def test_without_tls_or_keys_a_person_has_asked_for_it(charts: dict[str, Rendered]) -> None:
    for values in ("plaintext", "everything"):
        for each in pods_of(list(charts[values].objects)):
            config = each.config()
            assert config.insecure
            assert config.tls_cert is None, "what the image sets is taken back"
        assert "WARNING" in charts[values].notes
    assert "WARNING" not in charts["default"].notes


def test_engines_follow_the_registrys_service(charts: dict[str, Rendered]) -> None:
    for values in ("replicated", "everything"):
        rendered = charts[values]
        engine, registry = pod(rendered, "engine"), pod(rendered, "registry")
        assert (engine.flag("role"), registry.flag("role")) == ("engine", "registry")
        scheme, _, rest = engine.flag("registry").rpartition("://")
        assert scheme == ("https" if engine.flag("tls-cert") else "")
        host, _, port = rest.partition(":")
        name, namespace, svc = host.split(".")
        (service,) = (s for s in rendered.of("Service") if s["metadata"]["name"] == name)
        assert (service["metadata"]["namespace"], svc) == (namespace, "svc")
        assert service["spec"]["selector"].items() <= registry.labels.items()
        assert int(port) in {p["port"] for p in service["spec"]["ports"]}
        assert engine.flag("registry-key-file") == "/run/secrets/registry-key/key"
        assert bool(engine.flag("registry-cert")) == bool(engine.flag("tls-client-ca"))


def test_flags_of_values_reach_the_server(charts: dict[str, Rendered]) -> None:
    config = pod(charts["everything"], "engine").config()
    assert (config.base, config.kv_cache_bytes) == ("Qwen/Qwen3-1.7B", 4 << 30)
    assert (config.prefix_cache, config.exact) == (False, True)
    assert config.allow_base_name == ("base-a", "base-b")
    assert (config.max_running, config.max_queue_wait) == (128, 2.5)
    registry = pod(charts["everything"], "registry").config()
    assert (registry.constraint_fuel, registry.exact) == (1_000_000, False)


def test_one_switch_is_on_by_default() -> None:
    """The chart leaves out a switch that is false; of this one it writes --no-."""
    on = [each.name for each in OPTIONS if each.switch and each.default == "true"]
    assert on == ["prefix_cache"]


def _walk(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict) or not value:
        return [path]
    return [found for key, each in value.items() for found in _walk(each, (*path, key))]


def test_values_and_schema_have_the_same_keys() -> None:
    """A value without a schema may be misspelled; one without a default is not documented."""
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))

    def described(part: dict[str, Any], path: tuple[str, ...]) -> bool:
        for key in path:
            if "properties" not in part:
                return part.get("type") == "object" or "$ref" in part
            part = part["properties"].get(key, {})
        return bool(part)

    assert [path for path in _walk(values) if not described(schema, path)] == []
    missing: list[str] = []

    def compare(part: dict[str, Any], given: Any, path: str) -> None:
        for key, each in part.get("properties", {}).items():
            if key not in given:
                missing.append(f"{path}.{key}")
            elif isinstance(given[key], dict) and key != "resources":  # Kubernetes' own
                compare(each, given[key], f"{path}.{key}")

    compare(schema, values, "")
    assert missing == [".global"], "Helm's own"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda o: o["spec"].__setitem__("replicaCount", 1),
        lambda o: o["spec"]["template"]["spec"]["containers"][0].pop("name"),
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["ports"][0].__setitem__(
            "containerPort", "grpc"
        ),
    ],
)
def test_validation_is_strict(
    charts: dict[str, Rendered], break_it: Callable[[dict[str, Any]], object]
) -> None:
    (workload,) = copy.deepcopy(charts["default"].of("StatefulSet"))
    assert list(valid([workload])) == []
    break_it(workload)
    assert list(valid([workload])) != []
