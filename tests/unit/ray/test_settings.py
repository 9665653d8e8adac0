"""What ``veneer-ray up`` takes, and the flags of the servers that it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import veneer_server.__main__
from typer.main import get_command
from veneer_ray.settings import RayCluster
from veneer_registry.errors import InvalidField

from tests.refused import refused

HERE = Path("/data")
PORTS = Path("/ports.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replicas", 0),
        ("most_replicas", 1),
        ("ingresses", 0),
        ("cpus", -1),
        ("gpus", -1),
        ("drain_s", 0),
        ("wait_s", 0),
        ("registry", "50060"),
        ("registry", "host:port"),
        ("server_args", ("--threads", "1", "--listen=0.0.0.0:1")),
        ("server_args", ("--role", "all")),
        ("server_args", ("--tls-cert", "cert.pem")),
    ],
)
def test_what_is_out_of_range_is_refused(field: str, value: Any) -> None:
    with refused(InvalidField, field=field):
        RayCluster(HERE, **{"replicas": 2, field: value})


def test_the_number_of_engines_is_fixed_unless_more_are_allowed() -> None:
    assert not RayCluster(HERE, replicas=2).scales
    assert not RayCluster(HERE, replicas=2, most_replicas=2).scales
    assert RayCluster(HERE, replicas=2, most_replicas=3).scales


def test_the_servers_know_their_flags() -> None:
    cluster = RayCluster(
        HERE, cpus=2, key_file=HERE / "key", server_args=("--kv-cache-bytes", "1GiB")
    )
    serve: Any = get_command(veneer_server.__main__.cli)
    serve = serve.commands["serve"]
    known = {flag for parameter in serve.params for flag in parameter.opts}
    registry = cluster.registry_flags(PORTS)
    engine = cluster.engine_flags(HERE / "0", PORTS, "127.0.0.1")
    for flags in (registry, engine):
        assert {flag for flag in flags if flag.startswith("--")} <= known
        assert flags[-2:] == ["--kv-cache-bytes", "1GiB"]
    assert registry[registry.index("--listen") + 1] == cluster.registry
    assert engine[engine.index("--registry") + 1] == cluster.registry
    assert engine[engine.index("--registry-key-file") + 1] == "/data/key"
    assert engine[engine.index("--threads") + 1] == "2", "threads are what Ray sets aside"
    assert "--threads" not in RayCluster(HERE).engine_flags(HERE, PORTS, "127.0.0.1")


@pytest.mark.parametrize(
    ("registry", "host"),
    [
        ("127.0.0.1:50060", "127.0.0.1"),
        ("localhost:50060", "127.0.0.1"),
        ("[::1]:50060", "127.0.0.1"),
        ("10.0.0.1:50060", "10.0.0.7"),
        ("registry.example:50060", "10.0.0.7"),
    ],
)
def test_engines_are_reached_over_the_network_only_if_the_registry_is(
    registry: str, host: str
) -> None:
    cluster = RayCluster(HERE, registry=registry)
    assert cluster.engine_host("10.0.0.7") == host
    flags = cluster.engine_flags(HERE, PORTS, host)
    assert flags[flags.index("--listen") + 1] == f"{host}:0"
    assert flags[flags.index("--openai-listen") + 1] == f"{host}:0"


def test_settings_come_back_from_their_text() -> None:
    cluster = RayCluster(
        HERE, replicas=2, key_file=HERE / "key", server_args=("--threads", "1")
    )
    text = cluster.as_text()
    assert RayCluster.of_text(text) == cluster
    assert RayCluster.of_text(text).as_text() == text
