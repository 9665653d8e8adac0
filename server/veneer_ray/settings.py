"""Settings of ``veneer-ray up``: one frozen record that is passed to every deployment."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from veneer_registry.errors import InvalidField

_OURS: Final = frozenset(
    (
        "role",
        "registry",
        "listen",
        "metrics-listen",
        "openai-listen",
        "data-dir",
        "port-file",
        "admin-listen",
        "tls-cert",
        "tls-key",
        "tls-client-ca",
    )
)
"""Server flags that are set here, or that would change how the servers are called."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The cluster's settings, validated on construction.

    Args:
        data_dir: parent folder of ``registry``, ``engines/0``, ``engines/1`` and so on.
        replicas: number of engines; the minimum if ``most_replicas`` is larger.
        most_replicas: maximum number of engines; if larger than ``replicas``, their number
            follows the load.
        ingresses: number of processes that route. Each counts its own requests, and learns of
            the others' requests from the engines' reports.
        registry: ``HOST:PORT`` where the registry listens.
        http_host, http_port: address of the OpenAI API.
        grpc_port: port of the gRPC API, on all interfaces.
        cpus: CPUs that Ray reserves for each engine, and threads of the engine's steps; with 0
            it may use all.
        gpus: GPUs for each engine.
        drain_s: seconds that a removed replica has to finish its requests.
        wait_s: seconds that a request may wait for a replica to accept it.
        key_file: file with an operator's key, with which the engines follow the registry.
        server_args: further flags for all servers.

    Raises:
        InvalidField: a value is out of range; the error names its field.
    """

    data_dir: Path
    replicas: int = 1
    most_replicas: int = 0
    ingresses: int = 1
    registry: str = "127.0.0.1:50060"
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 50051
    cpus: float = 0.0
    gpus: float = 0.0
    drain_s: float = 600.0
    wait_s: float = 30.0
    key_file: Path | None = None
    server_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.replicas >= 1, "replicas", "at least 1")
        _check(
            self.most_replicas == 0 or self.most_replicas >= self.replicas,
            "most_replicas",
            "at least as many as replicas, or 0 for a fixed number",
        )
        _check(self.ingresses >= 1, "ingresses", "at least 1")
        _check(self.cpus >= 0, "cpus", "0 or more")
        _check(self.gpus >= 0, "gpus", "0 or more")
        _check(self.drain_s > 0, "drain_s", "more than 0")
        _check(self.wait_s > 0, "wait_s", "more than 0")
        host, _, port = self.registry.rpartition(":")
        _check(bool(host) and port.isdigit(), "registry", "HOST:PORT")
        for argument in self.server_args:
            flag = argument.removeprefix("--").partition("=")[0]
            _check(
                not (argument.startswith("--") and flag in _OURS),
                "server_args",
                f"without --{flag}: veneer-ray decides how servers are called",
            )

    def as_text(self) -> str:
        """The settings as text, for `of_text`. Serve compares the pickled arguments of
        replicas, which differ for equal records."""
        return json.dumps(asdict(self), default=str, sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> RayCluster:
        """The settings that `as_text` wrote."""
        found = json.loads(text)
        key = found.pop("key_file")
        return cls(
            data_dir=Path(found.pop("data_dir")),
            key_file=None if key is None else Path(key),
            server_args=tuple(found.pop("server_args")),
            **found,
        )

    @property
    def scales(self) -> bool:
        """Whether the number of engines follows the load."""
        return self.most_replicas > self.replicas

    def registry_flags(self, port_file: Path) -> list[str]:
        """Flags of the registry's process."""
        return [
            *("--role", "registry", "--listen", self.registry),
            *("--openai-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            *("--data-dir", str(self.data_dir / "registry"), "--port-file", str(port_file)),
            *self.server_args,
        ]

    def engine_host(self, here: str) -> str:
        """The address on which a machine's engines listen for the ingress: loopback if the
        registry is there too, since then all is on one machine.

        Args:
            here: the machine's address.
        """
        host = self.registry.rpartition(":")[0].strip("[]")
        with suppress(ValueError):
            if ip_address(host).is_loopback:
                return "127.0.0.1"
        return "127.0.0.1" if host == "localhost" else here

    def engine_flags(self, data_dir: Path, port_file: Path, host: str) -> list[str]:
        """Flags of an engine's process."""
        listen = f"[{host}]:0" if ":" in host else f"{host}:0"
        key = () if self.key_file is None else ("--registry-key-file", str(self.key_file))
        threads = ("--threads", str(int(self.cpus))) if self.cpus >= 1 else ()
        return [
            *("--role", "engine", "--registry", self.registry, "--listen", listen),
            *("--openai-listen", listen, "--metrics-listen", "127.0.0.1:0"),
            *("--data-dir", str(data_dir), "--port-file", str(port_file)),
            *("--grace", str(self.drain_s)),
            *key,
            *threads,
            *self.server_args,
        ]


def _check(good: bool, field: str, wanted: str) -> None:
    if not good:
        raise InvalidField(f"{field} must be {wanted}", metadata={"field": field})
