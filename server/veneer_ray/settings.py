"""What ``veneer-ray up`` deploys: one frozen record that travels to every deployment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
"""Flags of the servers that are set here, or that would change how they are called."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Checked when it is made.

    Args:
        data_dir: below it, ``registry`` and ``engines/0``, ``engines/1`` and so on.
        replicas: engines, at least this many where ``most_replicas`` is more.
        most_replicas: with more than ``replicas``, their number follows the load.
        ingresses: processes that route. Each counts on its own, and learns of the others'
            requests from the engines' reports.
        registry: ``HOST:PORT`` where the registry listens.
        http_host, http_port: of the OpenAI API.
        grpc_port: of the gRPC API; on all interfaces, since Serve's proxy knows no other way.
        cpus: that Ray sets aside for each engine, and threads of its steps. 0: it may use all.
        gpus: for each engine.
        drain_s: a replica that is taken away has so long to finish its requests.
        wait_s: a request waits so long for a replica that can take it.
        key_file: an operator's key, with which the engines follow the registry.
        server_args: further flags of all servers.

    Raises:
        InvalidField: naming what is out of range.
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
                f"without --{flag}: how servers are called is veneer-ray's",
            )

    def as_text(self) -> str:
        """For `of_text`. Serve compares what replicas are made with by its pickled bytes, which
        differ for equal records."""
        return json.dumps(asdict(self), default=str, sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> RayCluster:
        """What `as_text` wrote."""
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
        """Of the registry's process."""
        return [
            *("--role", "registry", "--listen", self.registry),
            *("--openai-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            *("--data-dir", str(self.data_dir / "registry"), "--port-file", str(port_file)),
            *self.server_args,
        ]

    def engine_flags(self, data_dir: Path, port_file: Path) -> list[str]:
        """Of an engine's process."""
        key = () if self.key_file is None else ("--registry-key-file", str(self.key_file))
        threads = ("--threads", str(int(self.cpus))) if self.cpus >= 1 else ()
        return [
            *("--role", "engine", "--registry", self.registry, "--listen", "127.0.0.1:0"),
            *("--openai-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            *("--data-dir", str(data_dir), "--port-file", str(port_file)),
            *key,
            *threads,
            *self.server_args,
        ]


def _check(good: bool, field: str, wanted: str) -> None:
    if not good:
        raise InvalidField(f"{field} must be {wanted}", metadata={"field": field})
