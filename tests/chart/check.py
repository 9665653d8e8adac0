"""What may be wrong with the objects of the chart: each check returns its findings as lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import typer
from veneer_server.__main__ import cli
from veneer_server.config import kinds

from tests.chart.custom import SCHEMAS
from tests.chart.pods import Pod, pods_of

Object = dict[str, Any]

OLDEST = "1.27"
"""Of Chart.yaml's kubeVersion."""
NEWEST = kubernetes_validate.latest_version()


def valid(objects: list[Object], version: str = NEWEST) -> Iterator[str]:
    """Against Kubernetes' own schemas, in which an unknown field is an error, and those of
    the kinds that others define."""
    for each in objects:
        try:
            if each["apiVersion"] in SCHEMAS:
                jsonschema.validate(each, SCHEMAS[each["apiVersion"]])
            else:
                kubernetes_validate.validate(each, version, strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            yield f"{_name(each)}: {'.'.join(map(str, error.path))}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"{_name(each)}: {error.message}"


def problems(objects: list[Object]) -> list[str]:
    """All findings, of validity and of what has to fit together."""
    pods = pods_of(objects)
    found = list(valid(objects))
    for check in CHECKS:
        found += check(objects, pods)
    return found


def _name(each: Object) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


def _of(objects: list[Object], kind: str, *, picker: bool = False) -> list[Object]:
    """Objects of a kind: those of servers, or those of the endpoint picker."""
    found = [each for each in objects if each["kind"] == kind]
    return [each for each in found if (_component(each) == "picker") == picker]


def _component(each: Object) -> str:
    return str(each["metadata"]["labels"]["app.kubernetes.io/component"])


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "DoesNotExist", "the only one that the chart uses"
        if expression["key"] in labels:
            return False
    return all(labels.get(key) == value for key, value in wanted.items())


def _names_are_unique(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    for each in objects:
        key = (each["kind"], each["metadata"]["name"])
        if key in seen:
            yield f"{_name(each)} is there twice"
        seen.add(key)
        if len(each["metadata"]["name"]) > 63:
            yield f"{_name(each)} has too long a name"


def _workloads_select_their_own_pods(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    for pod in pods:
        chosen = [p.name for p in pods if _matches(pod.workload["spec"]["selector"], p.labels)]
        if chosen != [pod.name]:
            yield f"{pod.name}: its selector chooses {chosen}"
        service = pod.workload["spec"].get("serviceName")
        if service and service not in {s["metadata"]["name"] for s in _of(objects, "Service")}:
            yield f"{pod.name}: there is no Service {service}"
        account = pod.spec["serviceAccountName"]
        accounts = {a["metadata"]["name"] for a in _of(objects, "ServiceAccount")}
        if account not in accounts | {"default"}:
            yield f"{pod.name}: there is no ServiceAccount {account}"


def _services_lead_to_ports(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    for service in _of(objects, "Service"):
        chosen = [
            p for p in pods if _matches({"matchLabels": service["spec"]["selector"]}, p.labels)
        ]
        if len(chosen) != 1:
            yield f"{_name(service)} chooses the pods of {[p.name for p in chosen]}"
        elif service["spec"]["selector"] != chosen[0].selector:
            yield f"{_name(service)} would leave out pods of another version"
        for port in service["spec"]["ports"]:
            for pod in chosen:
                if pod.ports.get(port["targetPort"]) != port["port"]:
                    yield f"{_name(service)}: {port['name']} is no port of {pod.name}"


def _policies_fit(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        covered: list[str] = []
        for policy in _of(objects, kind):
            field = "selector" if kind == "PodDisruptionBudget" else "podSelector"
            chosen = [p for p in pods if _matches(policy["spec"][field], p.labels)]
            covered += [p.name for p in chosen]
            if len(chosen) != 1:
                yield f"{_name(policy)} chooses the pods of {[p.name for p in chosen]}"
            elif policy["spec"][field]["matchLabels"] != chosen[0].selector:
                yield f"{_name(policy)} would leave out pods of another version"
            if kind == "NetworkPolicy" and chosen:
                opened = [
                    port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]
                ]
                if sorted(opened) != sorted(chosen[0].ports.values()):
                    yield f"{_name(policy)} opens {opened}, not the ports of {chosen[0].name}"
                if "Egress" in policy["spec"]["policyTypes"]:
                    for needed in _lacks_egress(policy["spec"]["egress"], chosen[0], pods):
                        yield f"{_name(policy)}: {chosen[0].name} does not reach {needed}"
        if covered and sorted(covered) != sorted(pod.name for pod in pods):
            yield f"{kind}: there is one for each of {covered}"


def _lacks_egress(rules: list[Object], pod: Pod, pods: list[Pod]) -> Iterator[str]:
    """What a pod must connect to and may not: each has a port, and where that is a pod of this
    release, its labels."""

    def open_to(port: int, labels: dict[str, str] | None = None) -> bool:
        def leads(peer: Object) -> bool:
            if labels is None:
                return True
            return "podSelector" in peer and _matches(peer["podSelector"], labels)

        return any(
            {"port": port, "protocol": "TCP"} in rule["ports"]
            and ("to" not in rule or any(map(leads, rule["to"])))
            for rule in rules
        )

    if not any({"port": 53, "protocol": "UDP"} in rule["ports"] for rule in rules):
        yield "name servers"
    if registry := pod.flag("registry"):
        port = int(registry.rpartition(":")[2])
        (other,) = [each for each in pods if each.component == "registry"]
        if not open_to(port, other.labels):
            yield f"the registry at {port}"
    if catalog := pod.flag("catalog"):
        hosts = catalog.partition("//")[2].partition("/")[0].rpartition("@")[2].split(",")
        for host in hosts:
            if not open_to(int(host.partition(":")[2] or 5432)):
                yield f"the catalog {host}"
    if pod.flag("store"):
        endpoint = urlsplit(pod.env.get("AWS_ENDPOINT_URL_S3", "https://s3.amazonaws.com"))
        if not open_to(endpoint.port or {"http": 80, "https": 443}[endpoint.scheme]):
            yield f"the store {endpoint.netloc}"


def _scaling_and_routing_fit(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    deployments = {d["metadata"]["name"]: d for d in _of(objects, "Deployment")}
    for scaler in _of(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        if target not in deployments:
            yield f"{_name(scaler)} scales {target}, which is not there"
        elif "replicas" in deployments[target]["spec"]:
            yield f"{target}: each upgrade would undo what the autoscaler did"
    for monitor in _of(objects, "ServiceMonitor"):
        services = [
            s
            for s in _of(objects, "Service")
            if _matches(monitor["spec"]["selector"], s["metadata"]["labels"])
        ]
        scraped = [s["spec"]["selector"]["app.kubernetes.io/component"] for s in services]
        if sorted(scraped) != sorted(p.component for p in pods):
            yield f"{_name(monitor)} scrapes {scraped}"
        for endpoint in monitor["spec"]["endpoints"]:
            tls = any(p.flag("tls-cert") for p in pods)
            if (endpoint["scheme"] == "https") != tls:
                yield f"{_name(monitor)} asks by {endpoint['scheme']}"
            if any(p.flag("keys-file") for p in pods) and "authorization" not in endpoint:
                yield f"{_name(monitor)} has no key"
            for service in services:
                if endpoint["port"] not in {p["name"] for p in service["spec"]["ports"]}:
                    yield f"{_name(monitor)}: {_name(service)} has no port {endpoint['port']}"
    for pool in _of(objects, "InferencePool"):
        chosen = [p for p in pods if _matches(pool["spec"]["selector"], p.labels)]
        ports = [port["number"] for port in pool["spec"]["targetPorts"]]
        if [[p.ports["http"]] for p in chosen] != [ports]:
            yield f"{_name(pool)}: ports {ports} of {[p.name for p in chosen]}"
        if any(p.flag("metrics-names") != "vllm" for p in chosen):
            yield f"{_name(pool)}: its picker reads metrics that {chosen[0].name} does not show"


def _the_picker_fits(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    """Veneer's own endpoint picker: its flags, and who reaches whom."""
    deployments = _of(objects, "Deployment", picker=True)
    (pool,) = _of(objects, "InferencePool") or (None,)
    if not deployments or pool is None:
        return
    (deployment,) = deployments
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    labels = template["metadata"]["labels"]
    group: Any = typer.main.get_command(cli)
    name, *args = container["args"]
    try:
        given = group.commands[name].make_context(name, args).params
    except Exception as error:  # whatever the parser raises is the finding
        yield f"picker: {type(error).__name__}: {error}"
        return
    (service,) = _of(objects, "Service", picker=True)
    (port,) = container["ports"]
    asked = pool["spec"]["endpointPickerRef"]
    found = {int(given["listen"].rpartition(":")[2]), port["containerPort"]}
    found |= {each["port"] for each in service["spec"]["ports"]} | {asked["port"]["number"]}
    if len(found) != 1:
        yield f"picker: it listens at one of {sorted(found)}"
    if asked["name"] != service["metadata"]["name"]:
        yield f"picker: the pool asks {asked['name']}"
    if not _matches({"matchLabels": service["spec"]["selector"]}, labels):
        yield "picker: its Service chooses other pods"
    (serving,) = [pod for pod in pods if _matches(pool["spec"]["selector"], pod.labels)]
    (replicas,) = given["replica"]
    host, _, number = replicas.rpartition(":")
    services = {
        f"{s['metadata']['name']}.{s['metadata']['namespace']}.svc": s["spec"]
        for s in _of(objects, "Service")
        if s["spec"].get("clusterIP") == "None"
    }
    if host not in services or services[host]["selector"] != serving.selector:
        yield f"picker: {host} does not lead to the pool's pods"
    if int(number) != serving.ports["http"]:
        yield f"picker: it asks port {number} for metrics"
    for flag, wanted in (("key_file", "keys-file"), ("replica_ca", "tls-cert")):
        if (given[flag] is None) == bool(serving.flag(wanted)):
            yield f"picker: {flag} is {given[flag]}, where servers have {wanted}"
    mounted = {m["mountPath"] for m in container["volumeMounts"] if m.get("readOnly")}
    for flag in ("key_file", "replica_ca", "tls_cert", "tls_key"):
        if given[flag] is not None and str(given[flag].parent) not in mounted:
            yield f"picker: {given[flag]} is not in a Secret that is mounted"
    for policy in _of(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"]["matchLabels"] == serving.selector:
            peers = policy["spec"]["ingress"][0]["from"]
            if not any(
                "podSelector" in p and _matches(p["podSelector"], labels) for p in peers
            ):
                yield f"picker: {serving.name} does not let it in"
    for policy in _of(objects, "NetworkPolicy", picker=True):
        reached = policy["spec"]["egress"][1]
        if not _matches(reached["to"][0]["podSelector"], serving.labels):
            yield "picker: it may not ask the pool's pods"


def _pods_are_closed(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    specs = [(pod.name, pod.spec) for pod in pods]
    others = [
        each for kind in ("Job", "Deployment") for each in _of(objects, kind, picker=True)
    ] + _of(objects, "Job")
    specs += [(_name(each), each["spec"]["template"]["spec"]) for each in others]
    for name, spec in specs:
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            inside = container["securityContext"]
            for setting, wanted in (
                (spec["securityContext"].get("runAsNonRoot"), True),
                (spec["securityContext"].get("runAsUser"), 10001),
                (inside.get("readOnlyRootFilesystem"), True),
                (inside.get("allowPrivilegeEscalation"), False),
                (inside.get("capabilities"), {"drop": ["ALL"]}),
                (spec.get("automountServiceAccountToken"), False),
            ):
                if setting != wanted:
                    yield f"{name}: {setting!r} where {wanted!r} is meant"


def _secrets_are_files(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    if _of(objects, "Secret"):
        yield "a Secret is rendered: its value would be in the release"
    for pod in pods:
        secrets = pod.mounted("secret")
        for path in pod.secret_paths:
            if not any(path.startswith(f"{folder}/") for folder in secrets):
                yield f"{pod.name}: {path} is not in a Secret that is mounted"
        text = json.dumps(pod.container.get("env", []))
        if "secretKeyRef" in text:
            yield f"{pod.name}: a secret is a variable, which any child process inherits"
        for mount in pod.container["volumeMounts"]:
            if mount["mountPath"] in secrets and not mount.get("readOnly"):
                yield f"{pod.name}: {mount['mountPath']} may be written to"
            if "subPath" in mount:
                yield f"{pod.name}: {mount['mountPath']} would stay the old one after a change"
        for volume in pod.spec["volumes"]:
            if "secret" in volume and volume["secret"].get("defaultMode", 0o644) & 0o007:
                yield f"{pod.name}: anybody may read the files of {volume['name']}"


def _volumes_are_mounted(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    for pod in pods:
        claims = pod.workload["spec"].get("volumeClaimTemplates", ())
        there = {v["name"] for v in pod.spec["volumes"]} | {
            c["metadata"]["name"] for c in claims
        }
        mounted = {m["name"] for m in pod.container["volumeMounts"]}
        if there != mounted:
            yield f"{pod.name}: volumes {sorted(there ^ mounted)} are on one side only"
        writable = [
            m["mountPath"] for m in pod.container["volumeMounts"] if not m.get("readOnly")
        ]
        if any(job["metadata"]["name"].endswith("-prepare") for job in _of(objects, "Job")):
            writable.append("/var/cache/veneer")  # by the Job, before the pod is there
        for flag in ("data-dir", "cache-dir"):
            if not any(f"{pod.flag(flag)}/".startswith(f"{folder}/") for folder in writable):
                yield f"{pod.name}: --{flag} is on the read-only root"


def _size(quantity: str) -> int:
    return kinds.BYTES.parse(f"{quantity}B")


def _the_nodes_disk_is_accounted_for(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    """A pod that fills more than it asked for is evicted, or fills its node."""
    for job in _of(objects, "Job"):
        for volume in job["spec"]["template"]["spec"]["volumes"]:
            if "sizeLimit" not in volume.get("emptyDir", {"sizeLimit": ""}):
                yield f"{_name(job)}: {volume['name']} has no limit"
    for pod in pods:
        folders = {v["name"]: v["emptyDir"] for v in pod.spec["volumes"] if "emptyDir" in v}
        endless = [name for name, folder in folders.items() if "sizeLimit" not in folder]
        if endless:
            yield f"{pod.name}: {endless} have no limit"
            continue
        sizes = {name: _size(folder["sizeLimit"]) for name, folder in folders.items()}
        for kind in ("requests", "limits"):
            asked = pod.container["resources"][kind].get("ephemeral-storage")
            if asked is None or _size(asked) < sum(sizes.values()):
                yield f"{pod.name}: {kind} {asked} of disk, and volumes of {folders}"
        caches = [pod.flag(f) for f in ("adapter-cache-bytes", "store-cache-bytes")]
        if "data" in sizes and sizes["data"] <= sum(map(int, filter(None, caches))):
            yield f"{pod.name}: caches of {caches} on a volume of {folders['data']}"


def _replicas_are_spread(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    """Each kind away from its own, and from no other."""
    for pod in pods:
        if pod.workload["kind"] != "Deployment":
            continue
        away = pod.spec["affinity"]["podAntiAffinity"]
        terms = away.get("preferredDuringSchedulingIgnoredDuringExecution", ())
        selectors = [term["podAffinityTerm"]["labelSelector"] for term in terms]
        selectors += [c["labelSelector"] for c in pod.spec.get("topologySpreadConstraints", ())]
        for selector in selectors:
            chosen = [p.name for p in pods if _matches(selector, p.labels)]
            if chosen != [pod.name]:
                yield f"{pod.name}: it is spread beside {chosen}"


def _drain_fits(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    for pod in pods:
        hook = pod.container["lifecycle"]["preStop"]["exec"]["command"]
        needed = float(hook[1]) + float(pod.flag("grace")) + 10
        if pod.spec["terminationGracePeriodSeconds"] < needed:
            yield f"{pod.name}: killed before its drain ends, which takes up to {needed} s"


def _tells_readiness(pod: Pod, probe: Object) -> bool:
    """Of its role: an engine is ready once it has a view of its registry."""
    if "grpc" in probe:
        service = "AdapterService" if pod.component == "registry" else "InferenceService"
        return bool(probe["grpc"].get("service") == f"veneer.v1.{service}")
    if "httpGet" in probe:
        return bool(probe["httpGet"]["path"] == "/health")
    return bool(probe["exec"]["command"][-1] == "health")


def _probes_reach(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    """The right port by the right protocol: Kubernetes' gRPC probes speak no TLS, and it has
    no certificate to show."""
    for pod in pods:
        tls, mutual = bool(pod.flag("tls-cert")), bool(pod.flag("tls-client-ca"))
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = pod.container[kind]
            if "grpc" in probe:
                fits = not tls and probe["grpc"]["port"] == pod.ports["grpc"]
            elif "httpGet" in probe:
                asked = probe["httpGet"]
                fits = asked["scheme"] == ("HTTPS" if tls else "HTTP") and not mutual
                fits = fits and asked["port"] == "http"
            elif "tcpSocket" in probe:
                fits = kind == "livenessProbe" and probe["tcpSocket"]["port"] == "grpc"
            else:
                fits = mutual and probe["exec"]["command"][0] == "veneer"
            if not fits:
                yield f"{pod.name}: its {kind} gets no answer"
            elif kind != "livenessProbe" and not _tells_readiness(pod, probe):
                yield f"{pod.name}: its {kind} does not tell whether it is ready"
        if "grpc" in pod.container["livenessProbe"]:
            if pod.container["livenessProbe"]["grpc"].get("service"):
                yield f"{pod.name}: killed while it loads"
        elif pod.container["livenessProbe"].get("httpGet", {}).get("path") == "/health":
            yield f"{pod.name}: killed while it loads"


def _refused(name: str, args: list[str]) -> Iterator[str]:
    """Why the program does not take a command's arguments."""
    command: Any = typer.main.get_command(cli)
    try:
        while hasattr(command, "commands"):
            word, *args = args
            command = command.commands[word]
        command.make_context(command.name, args)
    except Exception as error:  # whatever the parser raises is the finding
        yield f"{name}: {command.name}: {type(error).__name__}: {error}"


def _args_are_accepted(objects: list[Object], pods: list[Pod]) -> Iterator[str]:
    """By the server's own parser, with the image's variables; and the ports are those."""
    for job in _of(objects, "Job"):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        yield from _refused(_name(job), container["args"])
    for pod in pods:
        try:
            config = pod.config()
        except Exception as error:  # whatever the parser raises is the finding
            yield f"{pod.name}: {type(error).__name__}: {error}"
            continue
        if pod.preparing is not None:
            yield from _refused(pod.name, pod.preparing["args"])
        listens = {
            "grpc": config.listen,
            "http": config.openai_listen,
            "metrics": config.metrics_listen,
        }
        for name, address in listens.items():
            if address is None or address.loopback or address.port != pod.ports[name]:
                yield f"{pod.name}: {name} listens at {address}, not at {pod.ports[name]}"
        if (pod.component == "engine") != bool(pod.flag("registry")):
            yield f"{pod.name}: --registry {pod.flag('registry')!r}"


CHECKS: tuple[Callable[[list[Object], list[Pod]], Iterator[str]], ...] = (
    _names_are_unique,
    _workloads_select_their_own_pods,
    _services_lead_to_ports,
    _policies_fit,
    _scaling_and_routing_fit,
    _the_picker_fits,
    _pods_are_closed,
    _secrets_are_files,
    _volumes_are_mounted,
    _the_nodes_disk_is_accounted_for,
    _replicas_are_spread,
    _drain_fits,
    _probes_reach,
    _args_are_accepted,
)
