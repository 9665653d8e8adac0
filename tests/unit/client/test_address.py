"""The server's address, in the forms that people write it."""

from __future__ import annotations

import pytest
from veneer_client import Client
from veneer_client.address import server_address
from veneer_registry.errors import InvalidField

from tests.refused import refused
from tests.unit.client.fake_server import FakeServer


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("gpu1:50052", "gpu1:50052"),
        ("gpu1", "gpu1:50051"),
        ("10.0.0.7", "10.0.0.7:50051"),
        ("http://gpu1:50052", "gpu1:50052"),
        ("http://gpu1:50052/", "gpu1:50052"),
        ("grpc://gpu1", "gpu1:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:50052", "[::1]:50052"),
        ("http://[::1]:50052", "[::1]:50052"),
        (" gpu1 ", "gpu1:50051"),
        ("unix:/run/veneer.sock", "unix:/run/veneer.sock"),
        ("unix:///run/veneer.sock", "unix:///run/veneer.sock"),
        ("dns:///gpu1:50052", "dns:///gpu1:50052"),
        ("dns:50052", "dns:50052"),
    ],
)
def test_forms_of_an_address(given: str, meant: str) -> None:
    assert server_address(given) == meant


@pytest.mark.parametrize(
    "given",
    [
        "https://gpu1/v1",
        "ftp://gpu1",
        "gpu1:port",
        "http://gpu1/v1",
        "::1",
        "a b",
        "gpu1:0",
        "gpu1:65536",
        "[::1]:700500",
    ],
)
def test_what_is_no_address_is_refused_with_the_fix(given: str) -> None:
    with refused(InvalidField, field="server"):
        server_address(given)


def test_the_variable_and_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VENEER_SERVER", raising=False)
    assert server_address() == "127.0.0.1:50051"
    monkeypatch.setenv("VENEER_SERVER", "http://gpu1:7")
    assert server_address() == "gpu1:7"
    assert server_address("gpu2") == "gpu2:50051", "what is given comes first"


def test_a_client_finds_its_server_by_the_variable(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_SERVER", f"http://{server.address}")
    with Client() as client:
        assert client.info().version
