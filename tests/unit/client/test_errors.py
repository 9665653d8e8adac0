"""Every status becomes the exception that the server raised, in both clients."""

from __future__ import annotations

import socket
import threading

import grpc
import pytest
from veneer_client import ServerUnreachable, Text, VeneerError
from veneer_registry import errors

from tests.refused import refused
from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer, Refusal

ON_THE_WIRE = [
    getattr(errors, name)
    for name in errors.__all__
    if name not in ("error_for_reason", "VeneerError", "ServerUnreachable", "StoreLocked")
]


@pytest.mark.parametrize("cls", ON_THE_WIRE, ids=lambda cls: cls.reason)
def test_server_errors_are_rebuilt(
    cls: type[VeneerError], server: FakeServer, client: Driver
) -> None:
    server.refusals.append(
        Refusal(
            getattr(grpc.StatusCode, cls.code),
            f"a sentence about {cls.reason}",
            cls.reason,
            {"field": "x"},
            retry_s=60.0,  # longer than any client waits
        )
    )
    with pytest.raises(VeneerError) as caught:
        client.get("chat")
    assert type(caught.value) is cls
    assert str(caught.value) == f"a sentence about {cls.reason}"
    assert caught.value.metadata == {"field": "x"}
    assert caught.value.retry_after_s == 60.0


def test_unknown_reason_keeps_its_sentence(server: FakeServer, client: Driver) -> None:
    server.refusals.append(Refusal(grpc.StatusCode.ABORTED, "of a later version", "LATER"))
    # Words of the FAKE server, which the client must pass on, here and below.
    with pytest.raises(VeneerError, match="of a later version") as caught:
        client.info()
    assert type(caught.value) is VeneerError


def test_reason_of_another_domain_is_not_ours(server: FakeServer, client: Driver) -> None:
    server.refusals.append(
        Refusal(grpc.StatusCode.INTERNAL, "theirs", "QUEUE_FULL", domain="example.com")
    )
    with pytest.raises(errors.InternalError, match="theirs"):
        client.info()


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnreachable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unimplemented),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgument),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.UNKNOWN, errors.VeneerError),
    ],
)
def test_bare_status_by_code(
    code: grpc.StatusCode, cls: type[VeneerError], server: FakeServer, client: Driver
) -> None:
    server.refusals.append(Refusal(code, "from a proxy"))
    with pytest.raises(VeneerError, match="from a proxy") as caught:
        client.generate(Text("x"))
    assert type(caught.value) is cls
    assert server.count("Generate") == 1


def test_nobody_answers(kind: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can take it
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with driver(kind, address) as client, pytest.raises(ServerUnreachable) as caught:
            client.info()
    assert address in str(caught.value)
    assert "veneer-server" in str(caught.value)
    assert caught.value.metadata == {"address": address}


def test_own_deadline(server: FakeServer, client: Driver) -> None:
    server.hold = threading.Event()
    with refused(errors.DeadlineExceeded, cause="client_deadline"):
        client.generate(Text("x"), timeout_s=0.05)


def test_admin_deadline_is_the_clients(kind: str, server: FakeServer) -> None:
    server.refusals.append(
        Refusal(grpc.StatusCode.UNAVAILABLE, "later", "MODEL_LOADING", retry_s=0.5)
    )
    with (
        driver(kind, server.address, timeout_s=0.25) as client,
        pytest.raises(errors.ModelLoading),
    ):
        client.info()
    assert server.count("GetServerInfo") == 1, "the wait would pass the deadline"
