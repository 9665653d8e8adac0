"""Registries that share a catalog, and their followers: one's word holds at all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import replication_pb2, server_pb2

from tests.scale.proxy import Proxy
from tests.shared_services import BUCKET, Services
from tests.shared_services import running as services_running
from tests.unit.registry.kit import catalog_of
from tests.unit.server.follower.pair import generate, until
from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, prompt, running

pytestmark = pytest.mark.push


@dataclass
class Place:
    """Two registries on one catalog, and an engine that follows the second."""

    a: Front
    b: Front
    engine: Front
    proxy: Proxy
    services: Services
    folders: Path

    async def push(self, seed: int, **options: Any) -> Any:
        folder = self.folders / str(seed)
        if not folder.exists():
            make_adapter(folder, seed=seed)
        return await self.a.push(folder, "one", allow_replace=True, **options)


@pytest.fixture
async def place(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    with services_running() as services:
        for name, value in services.s3.environment().items():
            monkeypatch.setenv(name, value)
        shared = {
            "role": "registry",
            "store": f"s3://{BUCKET}/own",
            "catalog": services.postgres.url,
            "catalog_password_file": str(services.postgres.password_file),
        }
        async with (
            running(base_folder, front_cache, tmp_path / "a", **shared) as a,
            running(base_folder, front_cache, tmp_path / "b", **shared) as b,
            Proxy(b.addresses["grpc"]) as proxy,
            running(
                base_folder,
                front_cache,
                tmp_path / "engine",
                role="engine",
                registry=proxy.address,
            ) as engine,
        ):
            yield Place(a, b, engine, proxy, services, tmp_path)
            proxy.heal()


@asynccontextmanager
async def held_back(registry: Front) -> AsyncIterator[None]:
    """Keep a registry from applying what others change, as if it got no time to."""
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with _catalog(registry).exclusive.here():
            begun.set()
            end.wait()

    holding = asyncio.ensure_future(asyncio.to_thread(hold))
    await asyncio.to_thread(begun.wait)
    try:
        yield
    finally:
        end.set()
        await holding


def _catalog(registry: Front) -> Any:
    return catalog_of(registry.app._tenants.default.registry)


def everybody(within_s: float) -> replication_pb2.WaitForReplicas:
    wait = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    wait.at_most.FromNanoseconds(int(within_s * 1e9))
    return wait


async def facts(server: Front) -> Any:
    info = await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    return info.replication


async def test_a_change_waits_for_other_registries_and_their_followers(place: Place) -> None:
    pushed = await place.push(1, wait=everybody(60))
    reached = pushed.replicas
    assert (reached.live, reached.applied, reached.enough) == (2, 2, True)
    found = await generate(place.engine, "one")
    assert found.provenance.revision == pushed.adapter.revision
    place.proxy.freeze()
    late = await place.push(2, wait=everybody(2))
    assert (late.replicas.live, late.replicas.enough) == (2, False)
    place.proxy.heal()
    asked = pb.UpdateAdapterRequest(name="one", labels={"a": "b"}, wait=everybody(60))
    answer = await place.a.adapters.UpdateAdapter(asked)
    assert (answer.replicas.applied, answer.replicas.enough) == (2, True)
    found = await generate(place.engine, "one")
    assert found.provenance.revision == late.adapter.revision


async def test_a_registry_that_is_behind_is_waited_for_although_it_has_no_follower(
    place: Place,
) -> None:
    await place.push(1, wait=everybody(60))
    async with held_back(place.b):
        late = await place.push(2, wait=everybody(2))
        assert not late.replicas.enough
    pushed = await place.push(3, wait=everybody(60))
    assert pushed.replicas.enough
    found = await place.b.adapters.GetAdapter(pb.GetAdapterRequest(name="one"))
    assert found.adapter.revision == pushed.adapter.revision


async def test_an_engine_that_moves_to_a_registry_that_is_behind_does_not_go_back(
    place: Place,
) -> None:
    place.proxy.target = place.a.addresses["grpc"]
    place.proxy.cut()
    await place.push(1)

    async def answers(revision: str) -> bool:
        try:
            found = await generate(place.engine, "one")
        except grpc.aio.AioRpcError:
            return False
        return bool(found.provenance.revision == revision)

    asked = pb.GetAdapterRequest(name="one")
    old = (await place.a.adapters.GetAdapter(asked)).adapter.revision
    await until(lambda: answers(old))
    async with held_back(place.b):
        new = (await place.push(2)).adapter.revision
        await until(lambda: answers(new))
        assert (await place.b.adapters.GetAdapter(asked)).adapter.revision == old
        accepted = place.proxy.accepted
        place.proxy.target = place.b.addresses["grpc"]
        place.proxy.cut()
        # It tries there, more than once, and goes on with what it has.
        await until(lambda: _is(place.proxy.accepted >= accepted + 2))
        assert await answers(new)
        assert not (await facts(place.engine)).connected
    await until(lambda: _connected(place.engine))
    assert await answers(new)


async def test_a_registry_that_is_cut_off_refuses_strict_callers_and_so_do_its_followers(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.push(1, wait=everybody(60))
    strict = (("veneer-max-registry-lag", "30"),)
    asked, unknown = pb.GetAdapterRequest(name="one"), pb.GetAdapterRequest(name="two")
    await place.b.adapters.GetAdapter(asked, metadata=strict)
    await place.engine.inference.Generate(prompt(adapter="one"), metadata=strict)
    place.services.postgres.kill()
    age = _catalog(place.b).age
    await until(lambda: _is(not age.connected))
    clock = age._clock
    monkeypatch.setattr(age, "_clock", lambda: clock() + 60)
    refused = await failure(place.b.adapters.GetAdapter(asked, metadata=strict))
    assert (refused.code, refused.metadata["cause"]) == (
        grpc.StatusCode.UNAVAILABLE,
        "registry_lag",
    )
    assert (await failure(place.b.adapters.GetAdapter(unknown))).code is (
        grpc.StatusCode.UNAVAILABLE
    )
    await place.b.adapters.GetAdapter(asked)  # it takes any age

    async def old() -> bool:
        return bool((await facts(place.engine)).lag.ToTimedelta().total_seconds() > 30)

    await until(old)
    call = place.engine.inference.Generate(prompt(adapter="one"), metadata=strict)
    assert (await failure(call)).metadata["cause"] == "registry_lag"
    await generate(place.engine, "one")
    place.services.postgres.start()

    async def answered() -> bool:
        try:
            await place.engine.inference.Generate(prompt(adapter="one"), metadata=strict)
        except grpc.aio.AioRpcError:
            return False
        return True

    await until(answered)
    missing = await failure(place.b.adapters.GetAdapter(unknown))
    assert missing.reason == "ADAPTER_NOT_FOUND"


async def _connected(engine: Front) -> bool:
    return bool((await facts(engine)).connected)


async def _is(found: bool) -> bool:
    return found
