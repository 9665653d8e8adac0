"""A pod template of the chart, and the server's arguments in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from veneer_server.__main__ import cli
from veneer_server.config import OPTIONS, ServerConfig, load_config

from tests.packaging.dockerfile import parse

_OF_REGISTRY = ("registry-key-file", "registry-ca", "registry-cert", "registry-cert-key")
_OWN = ("keys-file", "tls-cert", "tls-key", "tls-client-ca", "catalog-password-file")
_SECRET_FLAGS = (*_OWN, *_OF_REGISTRY)
_SECRET_VARIABLES = ("AWS_SHARED_CREDENTIALS_FILE", "PGSSLROOTCERT")


@dataclass(frozen=True)
class Pod:
    """The template of one workload, with its one container."""

    workload: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.workload['kind']} {self.workload['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.workload["spec"]["template"]["metadata"]["labels"])

    @property
    def selector(self) -> dict[str, str]:
        """The labels by which its workload knows its pods, of any version."""
        return dict(self.workload["spec"]["selector"]["matchLabels"])

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.workload["spec"]["template"]["spec"])

    @property
    def container(self) -> dict[str, Any]:
        (found,) = self.spec["containers"]
        return dict(found)

    @property
    def preparing(self) -> dict[str, Any] | None:
        """The init container that prepares the base; None if there is none."""
        found = self.spec.get("initContainers", ())
        return dict(found[0]) if found else None

    @property
    def env(self) -> dict[str, str]:
        return {each["name"]: each.get("value", "") for each in self.container.get("env", ())}

    @property
    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def args(self) -> list[str]:
        return list(self.container["args"])

    @property
    def flags(self) -> dict[str, str]:
        """Flags without dashes -> the last value; "" for a switch."""
        pairs = (arg.removeprefix("--").partition("=") for arg in self.args)
        return {name: value for name, _, value in pairs}

    def flag(self, name: str) -> str:
        """The value of a flag; "" if it is not there."""
        return self.flags.get(name, "")

    def mounted(self, kind: str) -> list[str]:
        """Where volumes of a kind are mounted."""
        names = {volume["name"] for volume in self.spec["volumes"] if kind in volume}
        mounts = self.container["volumeMounts"]
        return [mount["mountPath"] for mount in mounts if mount["name"] in names]

    @property
    def secret_paths(self) -> list[str]:
        """Files that arguments, variables and probes name and that are secrets, or belong to
        them."""
        paths = [self.flag(name) for name in _SECRET_FLAGS]
        paths += [self.env.get(name, "") for name in _SECRET_VARIABLES]
        for probe in ("startupProbe", "readinessProbe"):
            command = self.container[probe].get("exec", {}).get("command", ())
            paths += [word.partition("=")[2] for word in command if "=/" in word]
        return [path for path in paths if path]

    def config(self) -> ServerConfig:
        """The configuration that the server would have. Raises what its parser raises."""
        group: Any = typer.main.get_command(cli)
        context = group.commands["serve"].make_context("serve", self.args)
        names = {option.name for option in OPTIONS}
        given = {key: value for key, value in context.params.items() if key in names}
        return load_config(given, {**image_variables(), **self.env})


def image_variables() -> dict[str, str]:
    """The variables that the image sets."""
    file = Path(__file__).resolve().parents[2] / "Dockerfile"
    last = parse(file.read_text("utf-8"))[-1]
    return dict(pair for step in last.steps if step.kind == "ENV" for pair in step.pairs)


def pods_of(objects: list[dict[str, Any]]) -> list[Pod]:
    """The pod templates of all servers."""
    kinds = ("StatefulSet", "Deployment")
    found = [Pod(each) for each in objects if each["kind"] in kinds]
    return [pod for pod in found if pod.component != "picker"]
