"""A server that is still loading: the CLI says so at once, a program can wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner
from veneer_client import Text
from veneer_client.cli.main import cli
from veneer_registry.errors import (
    ModelLoading,
    ServerUnreachable,
    Unavailable,
    VeneerError,
)

from tests.refused import refused
from tests.unit.client.drivers import driver
from tests.unit.client.fake_server import FakeServer
from tests.unit.client.refusals import Refusal

DOING = "compiling the kernels: 12 s so far"


class LoadingServer(FakeServer):
    """FAKE: refuses all but health with MODEL_LOADING, until `load` ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.doing = DOING
        self.asked = threading.Semaphore(0)
        """Released by each call that was refused."""

    def load(self) -> None:
        self.ready = True

    def note(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        super().note(method, request, context)
        if method != "Check" and not self.ready:
            self.asked.release()
            Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"the server is still loading ({self.doing}): retry in a few seconds",
                "MODEL_LOADING",
                {"doing": self.doing},
                retry_s=1.0,
            ).end(context)


@pytest.fixture
def server() -> Iterator[LoadingServer]:
    with LoadingServer() as fake:
        yield fake


def run(server: FakeServer, *args: str) -> Any:
    return CliRunner().invoke(cli, args, env={"VENEER_SERVER": server.address})


@pytest.mark.parametrize("command", [("generate", "Hi"), ("ls",), ("info",)])
def test_a_command_says_so_at_once_in_one_line(
    server: LoadingServer, command: tuple[str, ...]
) -> None:
    done = run(server, *command)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert DOING in line
    assert "`veneer health --wait 5m`" in line
    assert len(server.calls) == 1, "a person is not kept waiting in silence"


def test_health_says_what_is_done(server: LoadingServer) -> None:
    done = run(server, "health")
    assert (done.exit_code, done.stdout) == (1, "not_serving\n")
    assert done.stderr == f"loading: {DOING}\n"


@pytest.mark.push
def test_health_that_waits_says_each_part_once(server: LoadingServer) -> None:
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(run(server, "health", "--wait=60s")))
    waiting.start()
    server.asked.acquire()
    server.doing = "compiling the kernels: 13 s so far"
    server.asked.acquire()
    server.asked.acquire()
    server.doing = "packing the weights: 1 of 30 layers, 0.1 s so far"
    server.asked.acquire()
    server.asked.acquire()
    server.load()
    waiting.join()
    (done,) = found
    assert (done.exit_code, done.stdout) == (0, "serving\n")
    assert done.stderr.splitlines() == [f"loading: {DOING}", f"loading: {server.doing}"]


def test_the_sdk_waits(kind: str, server: LoadingServer) -> None:
    told: list[VeneerError] = []

    def take(why: VeneerError) -> None:
        told.append(why)
        if len(told) == 2:
            server.load()

    with driver(kind, server.address) as client:
        client.wait_until_ready(60.0, told=take)
        assert client.generate(Text("Hi")).text
    assert [type(why) for why in told] == [ModelLoading] * 2
    assert told[0].metadata["doing"] == DOING


def test_the_sdk_waits_for_a_server_that_is_not_there_yet(
    kind: str, server: LoadingServer
) -> None:
    server.ready = True
    server.stop()
    told: list[VeneerError] = []

    def take(why: VeneerError) -> None:
        told.append(why)
        if len(told) == 1:
            server.start()

    with driver(kind, server.address) as client:
        client.wait_until_ready(60.0, told=take)
    assert isinstance(told[0], ServerUnreachable)


def test_the_sdk_gives_up_and_says_what_it_waited_for(kind: str, server: LoadingServer) -> None:
    with driver(kind, server.address) as client:
        with pytest.raises(ModelLoading) as caught:
            client.wait_until_ready(0.3)
        assert caught.value.metadata["doing"] == DOING
    server.stop()
    with (
        driver(kind, server.address) as client,
        refused(ServerUnreachable, address=server.address),
    ):
        client.wait_until_ready(0.0)


def test_an_engine_that_is_started_again_is_waited_for_too(
    kind: str, server: LoadingServer
) -> None:
    """All calls but generate are answered then."""
    server.note = FakeServer.note.__get__(server)  # type: ignore[method-assign]
    told: list[VeneerError] = []

    def take(why: VeneerError) -> None:
        told.append(why)
        server.load()

    with driver(kind, server.address) as client:
        client.wait_until_ready(60.0, told=take)
    (why,) = told
    assert type(why) is Unavailable
    assert "engine" in why.message
