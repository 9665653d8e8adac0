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

ELSEWHERE = {
    "mode": "replicated",
    "engine": {"registry": {"keySecret": "followers"}},
    "catalog": {"url": "postgresql://veneer@db.example.org/veneer"},
    "store": {"url": "s3://adapters/production"},
}
"""Values with catalog and store, and defaults for the rest."""

VARIANTS: dict[str, dict[str, Any]] = {
    "elsewhere": ELSEWHERE,
    "one server elsewhere": {"catalog": ELSEWHERE["catalog"], "store": ELSEWHERE["store"]},
    "own affinity": {
        **ELSEWHERE,
        "engine": {
            **ELSEWHERE["engine"],  # type: ignore[dict-item]
            "affinity": {"podAntiAffinity": {}},
            "topologySpreadConstraints": [],
        },
        "registry": {"affinity": {"nodeAffinity": {}}},
    },
    "closed": {
        **ELSEWHERE,
        "networkPolicy": {"egress": {"https": False}},
        "store": {**ELSEWHERE["store"], "credentialsSecret": "store"},  # type: ignore[dict-item]
    },
    "open": {"networkPolicy": {"egress": {"enabled": False}}},
    "own disk": {"server": {"resources": {"limits": {"ephemeral-storage": "9Gi"}}}},
}
"""Values of single tests, beside those of `VALUES`."""

FIXES: dict[str, tuple[dict[str, Any], str]] = {
    "several registries of one volume": (
        {"mode": "replicated", "registry": {"replicas": 2}},
        "set catalog.url and store.url, or registry.replicas: 1",
    ),
    "a catalog without a store": (
        {**ELSEWHERE, "store": {}},
        "store.url is empty: catalog.url and store.url belong together, set both",
    ),
    "a store without a catalog": (
        {**ELSEWHERE, "catalog": {}},
        "catalog.url is empty: catalog.url and store.url belong together, set both",
    ),
    "a password in the release": (
        {**ELSEWHERE, "catalog": {"url": "postgresql://veneer:s3cret@db/veneer"}},
        "put it into a Secret, and set catalog.passwordSecret",
    ),
    "two folders of bases": (
        {"bases": {"claim": "bases", "hostPath": "/bases"}},
        "remove one of them",
    ),
    "a Job that fills one node's folder": (
        {"bases": {"hostPath": "/bases", "prepare": "job"}},
        "set bases.claim, or bases.prepare: pod",
    ),
}
"""Values that exclude each other, and what the error must say."""

REFUSED: dict[str, dict[str, Any]] = {
    "an unknown value": {"engine": {"replica": 3}},
    "a value of the wrong type": {"ports": {"grpc": "50051"}},
    "a mode that there is not": {"mode": "cluster"},
    "a flag that the chart sets itself": {"flags": {"listen": "0.0.0.0:1"}},
    "a flag that would open the server": {"server": {"flags": {"insecure": True}}},
    "a scrape without a key": {"metrics": {"serviceMonitor": {"enabled": True}}},
    "a picker without a key": {"inferencePool": {"enabled": True}},
    "engines without a key for the registry": {"mode": "replicated"},
    "client certificates without an authority": {"tls": {"clients": {"enabled": True}}},
    "a catalog that is no PostgreSQL": {**ELSEWHERE, "catalog": {"url": "mysql://db/veneer"}},
    "a store that is no bucket": {**ELSEWHERE, "store": {"url": "/mnt/adapters"}},
    "an invalid cache size": {"engine": {"adapterCache": "ten"}},
    "a cache flag beside its value": {"engine": {"flags": {"adapter-cache-bytes": "1GiB"}}},
    "a folder of bases that is no path": {"bases": {"hostPath": "bases"}},
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
    "a registry that is asked whether it generates": (
        "_probes.tpl",
        '"veneer.v1.AdapterService"',
        '"veneer.v1.InferenceService"',
        "everything",
    ),
    "a readiness that does not wait for the registry": (
        "_probes.tpl",
        '"path" "/health"',
        '"path" "/livez"',
        "picker",
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
    "registries that are spread as engines are": (
        "_pod.tpl",
        '$own := dict "matchLabels" (include "veneer.selector" . | fromYaml)',
        '$own := dict "matchLabels" (dict "app.kubernetes.io/component" "engine")',
        "registries",
    ),
    "a volume that may fill its node": (
        "_storage.tpl",
        "emptyDir: {sizeLimit: {{ $v.tmp }}}",
        "emptyDir: {}",
        "default",
    ),
    "disk that was not asked for": (
        "_storage.tpl",
        '$parts = append $parts (include "veneer.dataSize" .)',
        "$parts = append $parts .root.Values.tmp",
        "registries",
    ),
    "a cache larger than its volume": (
        "_storage.tpl",
        "$parts = append $parts $v.engine.adapterCache",
        '$parts = append $parts "1Gi"',
        "registries",
    ),
    "engines that do not reach the registry": (
        "_egress.tpl",
        '(dict "root" .root "component" "registry")',
        '(dict "root" .root "component" "engine")',
        "replicated",
    ),
    "a registry that does not reach its catalog": (
        "_egress.tpl",
        '"url" $v.catalog.url',
        '"url" "postgresql://db/veneer"',
        "registries",
    ),
    "engines that do not reach the store": (
        "_egress.tpl",
        '(default "https://s3" $v.store.endpoint)',
        '"https://s3"',
        "registries",
    ),
    "a policy without name servers": (
        "_egress.tpl",
        "{port: 53, protocol: UDP}",
        "{port: 54, protocol: UDP}",
        "default",
    ),
    "credentials that are not where they are mounted": (
        "_storage.tpl",
        "value: /run/secrets/store/credentials",
        "value: /run/store/credentials",
        "registries",
    ),
    "a preparation with a flag that there is not": (
        "_storage.tpl",
        '  {{- include "veneer.args" . | trim | nindent 2 }}',
        '  {{- include "veneer.args" . | trim | nindent 2 }}\n  - --lock=shared',
        "registries",
    ),
    "a Job with a command that there is not": (
        "_storage.tpl",
        "  - prepare\n",
        "  - provide\n",
        "everything",
    ),
    "a preparation that writes to its root": (
        "_storage.tpl",
        '{{- include "veneer.containerSecurity" . | nindent 2 }}',
        "{privileged: true}",
        "registries",
    ),
    "a picker that asks other pods": (
        "picker.yaml",
        'printf "--replica=%s.%s.svc:%v" $pool',
        'printf "--replica=%s.%s.svc:%v" (include "veneer.fullname" .)',
        "picker",
    ),
    "a picker that is not let in": (
        "policies.yaml",
        '(dict "root" $root "component" "picker")',
        '(dict "root" $root "component" "registry")',
        "picker",
    ),
    "a picker at another port than the pool says": (
        "picker.yaml",
        'printf "--listen=0.0.0.0:%v" $picker.port',
        'printf "--listen=0.0.0.0:%v" 9002',
        "picker",
    ),
    "a picker without servers' keys": (
        "picker.yaml",
        "{{- if $v.keys.enabled }}",
        "{{- if false }}",
        "picker",
    ),
    "a picker with a flag that there is not": (
        "picker.yaml",
        "--replica-ca=",
        "--ca=",
        "picker",
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
    for name, values in {**VARIANTS, **REFUSED}.items():
        cases[name] = (CHART, values)
    for name, (values, _) in FIXES.items():
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


@pytest.mark.parametrize("values", FIXES)
def test_values_that_exclude_each_other_name_the_way_out(
    charts: dict[str, Rendered], values: str
) -> None:
    error = charts[values].error
    assert FIXES[values][1] in error
    assert "s3cret" not in error


@pytest.mark.parametrize("values", VARIANTS)
def test_variants_are_valid_and_fit_together(charts: dict[str, Rendered], values: str) -> None:
    assert charts[values].error == ""
    assert problems(list(charts[values].objects)) == []


def workload(rendered: Rendered, component: str) -> dict[str, Any]:
    return pod(rendered, component).workload


def test_with_catalog_and_store_registries_are_replicas_without_a_claim(
    charts: dict[str, Rendered],
) -> None:
    for values, replicas in (("elsewhere", 2), ("registries", 3)):
        rendered = charts[values]
        assert rendered.of("StatefulSet") == []
        registry = workload(rendered, "registry")
        assert registry["kind"] == "Deployment"
        assert registry["spec"]["replicas"] == replicas
        assert registry["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        config = pod(rendered, "registry").config()
        assert (config.role, config.store) == ("registry", "s3://adapters/production")
        assert config.catalog.startswith("postgresql://veneer@")
        engine = pod(rendered, "engine").config()
        assert (engine.store, engine.catalog) == (config.store, "")
        headless = [s for s in rendered.of("Service") if s["spec"].get("clusterIP") == "None"]
        assert headless == [], "a pod that may be any of several is not called by its name"
    assert workload(charts["replicated"], "registry")["kind"] == "StatefulSet"
    single = pod(charts["one server elsewhere"], "server")
    assert single.workload["kind"] == "StatefulSet"
    assert single.config().catalog == "postgresql://veneer@db.example.org/veneer"


def test_credentials_of_catalog_and_store_come_from_secrets(
    charts: dict[str, Rendered],
) -> None:
    def secrets(component: str) -> dict[str, str]:
        volumes = pod(charts["registries"], component).spec["volumes"]
        return {v["name"]: v["secret"]["secretName"] for v in volumes if "secret" in v}

    registry, engine = secrets("registry"), secrets("engine")
    assert (registry["store"], engine["store"]) == ("store", "store-reader")
    assert (registry["catalog"], registry["catalog-ca"]) == ("catalog", "catalog-ca")
    assert {"catalog", "catalog-ca"}.isdisjoint(engine), "engines do not call the database"
    config = pod(charts["registries"], "registry").config()
    assert str(config.catalog_password_file) == "/run/secrets/catalog/password"
    env = pod(charts["registries"], "engine").env
    assert env["AWS_ENDPOINT_URL_S3"] == "http://minio.storage.svc:9000"


@pytest.mark.parametrize("component", ["registry", "engine"])
def test_replicas_go_to_different_nodes_and_zones_unless_values_say_otherwise(
    charts: dict[str, Rendered], component: str
) -> None:
    spec = pod(charts["elsewhere"], component).spec
    (away,) = spec["affinity"]["podAntiAffinity"].values()
    assert [each["podAffinityTerm"]["topologyKey"] for each in away] == [
        "kubernetes.io/hostname"
    ]
    (zones,) = spec["topologySpreadConstraints"]
    assert zones["topologyKey"] == "topology.kubernetes.io/zone"
    assert zones["whenUnsatisfiable"] == "ScheduleAnyway", "one zone is enough to install"
    budgets = charts["elsewhere"].of("PodDisruptionBudget")
    assert f"veneer-{component}" in [each["metadata"]["name"] for each in budgets]


def test_affinity_and_spread_are_overridden(charts: dict[str, Rendered]) -> None:
    engine = pod(charts["own affinity"], "engine").spec
    assert engine["affinity"] == {"podAntiAffinity": {}}
    assert "topologySpreadConstraints" not in engine
    registry = pod(charts["own affinity"], "registry").spec
    assert registry["affinity"].keys() == {"nodeAffinity", "podAntiAffinity"}


def test_disk_follows_from_the_caches(charts: dict[str, Rendered]) -> None:
    """2 GiB beside the caches of a volume, and 1 GiB for logs beside the volumes."""

    def disk(values: str, component: str) -> tuple[str, str]:
        found = pod(charts[values], component)
        (data,) = [v for v in found.spec["volumes"] if v["name"] == "data"]
        limits = found.container["resources"]["limits"]
        return data["emptyDir"]["sizeLimit"], limits["ephemeral-storage"]

    gib = 1024
    # Bases are in the node's folder, not in the pod's.
    assert disk("registries", "engine") == (f"{52 * gib}Mi", f"{54 * gib}Mi")
    assert disk("registries", "registry") == (f"{52 * gib}Mi", f"{54 * gib}Mi")
    assert disk("elsewhere", "engine") == (f"{22 * gib}Mi", f"{24 * gib}Mi")
    server = pod(charts["own disk"], "server").container["resources"]
    assert server["limits"]["ephemeral-storage"] == "9Gi"
    assert server["requests"]["ephemeral-storage"] == f"{2 * gib}Mi"


def egress(rendered: Rendered, component: str) -> dict[int, Any]:
    """TCP ports that a component may connect to, and to whom; None: to any address."""
    (policy,) = [
        each
        for each in rendered.of("NetworkPolicy")
        if each["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return {
        port["port"]: rule.get("to")
        for rule in policy["spec"]["egress"]
        for port in rule["ports"]
        if port["protocol"] == "TCP"
    }


def test_pods_connect_only_to_what_values_name(charts: dict[str, Rendered]) -> None:
    assert egress(charts["default"], "server") == {53: None, 5353: None, 443: None}
    registry = egress(charts["registries"], "registry")
    assert registry.keys() == {53, 5353, 443, 6432, 6433, 8443, 9000}
    assert registry[6432] == [{"ipBlock": {"cidr": "10.2.0.0/24"}}]
    assert registry[9000] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "storage"}}}
    ]
    engine = egress(charts["registries"], "engine")
    assert engine.keys() == {53, 5353, 443, 8443, 9000, 50051}
    assert egress(charts["closed"], "engine").keys() == {53, 5353, 443, 50051}, "the store"
    everything = egress(charts["everything"], "engine")
    assert everything.keys() == {53, 5353, 8443, 50061}
    assert everything[53] is not None
    (policy,) = charts["open"].of("NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_a_role_instead_of_credentials_may_be_asked_for(charts: dict[str, Rendered]) -> None:
    addresses = egress(charts["elsewhere"], "registry")[80]
    assert {"ipBlock": {"cidr": "169.254.169.254/32"}} in addresses
    assert 80 not in egress(charts["closed"], "registry")


def test_pods_of_a_node_share_a_folder_and_prepare_the_base_in_it(
    charts: dict[str, Rendered],
) -> None:
    for component in ("engine", "registry"):
        found = pod(charts["registries"], component)
        preparing = found.preparing
        assert preparing is not None
        assert preparing["args"] == ["model", "prepare", *found.args], "the same base"
        (bases,) = [v for v in found.spec["volumes"] if v["name"] == "bases"]
        assert bases["hostPath"] == {"path": "/var/cache/veneer", "type": "Directory"}
        folders = {m["mountPath"] for m in preparing["volumeMounts"] if not m.get("readOnly")}
        assert found.flag("cache-dir") in folders
        variables = {each["name"]: each["value"] for each in preparing["env"]}
        assert variables["HF_HOME"].startswith(found.flag("cache-dir"))
        assert not any("secret" in m["mountPath"] for m in preparing["volumeMounts"])
    assert pod(charts["default"], "server").preparing is None


def test_a_job_prepares_the_base_and_pods_only_read_it(charts: dict[str, Rendered]) -> None:
    rendered = charts["everything"]
    (job,) = rendered.of("Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["model", "prepare", *pod(rendered, "engine").args]
    (own,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/var/cache/veneer"]
    assert not own.get("readOnly")
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["HF_HOME"].startswith("/var/cache/veneer/")
    for component in ("engine", "registry"):
        found = pod(rendered, component)
        (mount,) = [
            m
            for m in found.container["volumeMounts"]
            if m["mountPath"] == found.flag("cache-dir")
        ]
        assert mount["readOnly"] is True
        assert found.env["HF_HUB_OFFLINE"] == "1"
        assert found.preparing is None


def test_a_pool_without_a_picker_of_others_gets_veneer_s(charts: dict[str, Rendered]) -> None:
    (pool,) = charts["picker"].of("InferencePool")
    assert pool["spec"]["endpointPickerRef"]["name"] == "veneer-picker"
    (picker,) = [d for d in charts["picker"].of("Deployment") if "picker" in str(d["metadata"])]
    assert picker["spec"]["replicas"] == 3
    assert "topologySpreadConstraints" in picker["spec"]["template"]["spec"]
    (container,) = picker["spec"]["template"]["spec"]["containers"]
    assert "tcpSocket" in container["readinessProbe"], "gRPC probes speak no TLS"
    (plain,) = charts["plaintext"].of("Deployment")
    (container,) = plain["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["grpc"] == {"port": 9002, "service": "readiness"}
    (theirs,) = charts["everything"].of("InferencePool")
    assert theirs["spec"]["endpointPickerRef"]["name"] == "adapters-epp"
    assert not [d for d in charts["everything"].of("Deployment") if "picker" in str(d)]


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
