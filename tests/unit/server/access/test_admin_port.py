"""A gRPC port of its own for what changes something: ``--admin-listen``.

Which methods those are comes from the table of docs/security.md, as in `test_table`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_client import AsyncClient
from veneer_proto.v1 import adapters_pb2, server_pb2
from veneer_server.access.edit_keys import add_key
from veneer_server.access.principal import ROLES
from veneer_server.app import App
from veneer_server.config import load_config
from veneer_server.doors import CannotListen

from tests.pki import Pki
from tests.planted import planted
from tests.refused import refused
from tests.unit.server.access.test_table import body, table
from tests.unit.server.access.test_tls import content
from tests.unit.server.rpc.fake_engine import FakeEngine
from tests.unit.server.rpc.front_harness import Front, failure, prompt, running, until

GRPC = sorted(method for method in table() if " " not in method)
"""Every method of a gRPC port."""

HTTP = sorted(method for method in table() if " /" in method and "metrics port" not in method)
"""Every method of the HTTP gateway."""

DELETE = adapters_pb2.DeleteAdapterRequest(name="none")
KINDS = ("no key", "wrong or expired key", *ROLES)
NAMES = {
    "Health": "grpc.health.v1.Health",
    "ServerReflection": "grpc.reflection.v1.ServerReflection",
}
"""Services that are not ``veneer.v1``'s."""
REFUSED = {"UNAUTHENTICATED": "401", "PERMISSION_DENIED": "403"}


def on_admin_port(method: str) -> bool:
    """Whether it is one of those that the page says only the admin port answers."""
    return "yes" not in {table()[method][who] for who in ("no key", "inference", "metrics")}


async def empty(port: Front, method: str, key: str) -> grpc.aio.AioRpcError | None:
    """Call a method with an empty request; the error, if there is one."""
    service, _, name = method.partition("/")
    path = f"/{NAMES.get(service, f'veneer.v1.{service}')}/{name}"
    # On the wire, a stream of one message is the same as a message.
    metadata = (("x-api-key", key),) if key else ()
    call: Any = port.channel.unary_stream(path)(b"", metadata=metadata)
    try:
        await call.read()
        return None
    except grpc.aio.AioRpcError as error:
        return error
    finally:
        call.cancel()


async def told(port: Front, method: str, key: str) -> str:
    error = await empty(port, method, key)
    return "yes" if error is None else REFUSED.get(error.code().name, "yes")


@dataclass
class Both:
    """One server, over each of its gRPC ports; and a key of each kind."""

    main: Front
    admin: Front
    keys: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Both]:
    data = tmp_path_factory.mktemp("two-ports")
    file = data / "keys.toml"
    keys = dict(zip(KINDS, ("", "vn_nobody_x"), strict=False))
    for role in ROLES:
        made = add_key(file, name=role, tenant="default", roles=[role], expires=None)
        keys[role] = made.key
    async with (
        running(
            base_folder,
            front_cache,
            data,
            admin_listen="127.0.0.1:0",
            openai_listen="127.0.0.1:0",
            keys_file=str(file),
            refusal_rate="0",
        ) as front,
        grpc.aio.insecure_channel(front.addresses["admin"]) as channel,
    ):
        yield Both(front, replace(front, channel=channel), keys)


@pytest.mark.push
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", GRPC)
async def test_each_port_answers_what_the_page_says(both: Both, method: str) -> None:
    expected = {who: table()[method][who] for who in KINDS}
    moved = {who: "403" if given == "yes" else given for who, given in expected.items()}
    for port, right in (
        (both.admin, expected),
        (both.main, moved if on_admin_port(method) else expected),
    ):
        assert {who: await told(port, method, both.keys[who]) for who in KINDS} == right


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", HTTP)
async def test_the_gateway_changes_nothing_either(both: Both, method: str) -> None:
    verb, path = method.split()
    headers = {"x-api-key": both.keys["operator"]}
    url = f"http://{both.main.addresses['openai']}{path}"
    async with httpx.AsyncClient(trust_env=False) as http:
        given = body(path, "") if verb == "POST" else None
        answer = await http.request(verb, url, headers=headers, json=given)
    assert (answer.status_code == 403) == on_admin_port(method)
    if answer.status_code == 403:
        assert "admin port" in answer.json()["error"]["message"]


def test_the_page_names_methods_of_both_kinds() -> None:
    moved = {method for method in GRPC if on_admin_port(method)}
    assert {"AdapterService/UploadAdapter", "AdapterService/SelfTest"} <= moved
    assert not moved & {"InferenceService/Generate", "ServerService/GetServerInfo"}
    moved = {method for method in HTTP if on_admin_port(method)}
    assert {"POST /v1/load_lora_adapter", "POST /pause"} <= moved
    assert not moved & {"POST /v1/completions", "GET /metrics", "GET /health"}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", [method for method in GRPC if on_admin_port(method)])
async def test_a_refusal_names_the_port_and_not_its_address(both: Both, method: str) -> None:
    error = await empty(both.main, method, both.keys["operator"])
    assert error is not None
    status = status_pb2.Status.FromString(
        dict(error.trailing_metadata())["grpc-status-details-bin"]
    )
    text = f"{status}"
    assert "admin port" in status.message
    assert "admin_port" in text
    host, _, port = both.main.addresses["admin"].rpartition(":")
    assert host not in text
    assert port not in text


@pytest.mark.asyncio(loop_scope="module")
async def test_a_hole_is_seen(both: Both) -> None:
    from veneer_server.access import authenticate

    with planted(authenticate, "if method in elsewhere:", "if False:"):
        for method in ("AdapterService/DeleteAdapter", "AdapterService/SetAlias"):
            assert await told(both.main, method, both.keys["operator"]) == "yes"


async def test_without_keys_the_ports_are_apart_too(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        running(base_folder, front_cache, tmp_path, admin_listen="127.0.0.1:0") as front,
        grpc.aio.insecure_channel(front.addresses["admin"]) as channel,
    ):
        admin = replace(front, channel=channel)
        assert (await failure(front.adapters.DeleteAdapter(DELETE))).metadata["cause"] == (
            "admin_port"
        )
        assert (await failure(admin.adapters.DeleteAdapter(DELETE))).reason == (
            "ADAPTER_NOT_FOUND"
        )
        for port in (front, admin):
            info = await port.server.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert info.admin_port
            assert (await port.inference.Generate(prompt())).text
            health = health_pb2_grpc.HealthStub(port.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_calls_on_both_ports_are_drained(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        running(base_folder, front_cache, tmp_path, admin_listen="127.0.0.1:0") as front,
        grpc.aio.insecure_channel(front.addresses["admin"]) as channel,
    ):
        admin = replace(front, channel=channel)
        front.engine.pace = asyncio.Semaphore(0)
        calls = [port.inference.Generate(prompt()) for port in (front, admin)]
        await until(lambda: front.calls == 2)
        front.app.stop()
        for _ in range(1000):
            front.engine.pace.release()
        for call in calls:
            assert (await call).text
        await front.task


async def test_it_speaks_tls_as_the_others(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    pki = Pki(tmp_path / "pki")
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        credentials=grpc.ssl_channel_credentials(content(pki.ca_file)),
        admin_listen="127.0.0.1:0",
        tls_cert=pki.cert,
        tls_key=pki.key,
    ) as front:
        address = f"https://{front.addresses['admin']}"
        async with AsyncClient(address, ca=pki.ca_file) as client:
            assert (await client.info()).version
        async with grpc.aio.insecure_channel(front.addresses["admin"]) as plain:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await replace(front, channel=plain).server.GetServerInfo(
                    server_pb2.GetServerInfoRequest()
                )
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_its_address_is_told_and_one_that_is_taken_is_named(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    port_file = tmp_path / "told.json"
    flags = {"base": str(base_folder), "cache_dir": str(front_cache), "metrics_listen": ""}
    own = {"listen": "127.0.0.1:0", "data_dir": str(tmp_path / "own")}
    lines: list[str] = []
    config = load_config(
        {**flags, **own, "admin_listen": "127.0.0.1:0", "port_file": str(port_file)}, {}
    )
    app = App(config, lines.append, FakeEngine)
    task = asyncio.create_task(app.run())
    await until(lambda: bool(lines) or task.done())
    admin = json.loads(port_file.read_text())["admin"]
    assert f"admin={admin}" in lines[0]
    with refused(CannotListen, flag="--admin-listen", address=admin):
        async with running(base_folder, front_cache, tmp_path / "two", admin_listen=admin):
            pass
    app.stop()
    await task


async def test_without_the_flag_there_is_no_second_port(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path) as front:
        assert front.addresses["admin"] == ""
        info = await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        assert not info.admin_port
        assert isinstance(front, Front)
        assert (await failure(front.adapters.DeleteAdapter(DELETE))).reason == (
            "ADAPTER_NOT_FOUND"
        )
