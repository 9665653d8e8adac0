"""A follower and its registry: whole front processes on real sockets, with fake engines."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_client import AsyncClient, ReplicasReached, ServingStatus, Text, WaitReplicas
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import inference_pb2, replication_pb2, server_pb2
from veneer_registry.errors import AdapterBudgetExceeded
from veneer_server import roles
from veneer_server.access.edit_keys import add_key, revoke_key
from veneer_server.access.principal import Role
from veneer_server.follower.link import RegistryLink
from veneer_server.rpc import replication_service

from tests.pki import Pki
from tests.ports import free_port
from tests.scale.proxy import Proxy
from tests.shared_services import BUCKET
from tests.shared_services import running as services_running
from tests.unit.server.follower.pair import Pair, bearer, generate, pair, until
from tests.unit.server.rpc.front_harness import (
    Front,
    failure,
    make_adapter,
    prompt,
    running,
    upload,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    tmp = tmp_path_factory.mktemp("pair")
    roots = {"lora_root": str(tmp)}
    async with pair(base_folder, front_cache, tmp, registry=roots) as found:
        yield found


@pytest.mark.push
async def test_what_is_published_is_generated_by_the_follower(both: Pair) -> None:
    pushed = await both.push("greeter", 1)
    await both.agreed()
    here = await generate(both.follower, "greeter")
    there = await generate(both.registry, "greeter")
    assert here.text == there.text
    assert here.provenance.revision == pushed.adapter.revision
    assert here.provenance.tier == inference_pb2.TIER_REMOTE
    again = await generate(both.follower, "greeter")
    assert again.provenance.tier == inference_pb2.TIER_DEVICE
    page = await both.follower.metrics()
    assert 'veneer_adapter_fetches_total{result="ok"} 1.0' in page
    assert 'veneer_time_to_first_token_seconds_count{adapter_tier="remote"} 1.0' in page


async def test_aliases_labels_sharing_and_deletion_are_mirrored(both: Pair) -> None:
    first = (await both.push("moves", 2)).adapter.revision
    second = (await both.push("moves", 3, allow_replace=True)).adapter.revision
    await both.registry.adapters.SetAlias(pb.SetAliasRequest(alias="moves/old", revision=first))
    await both.registry.adapters.UpdateAdapter(
        pb.UpdateAdapterRequest(name="moves", labels={"team": "red"})
    )
    await both.agreed()
    shown = await both.follower.adapters.GetAdapter(pb.GetAdapterRequest(name="moves"))
    assert [each.revision for each in shown.revisions] == [second, first]
    assert shown.adapter.labels == {"team": "red"}
    asked = await generate(both.follower, "moves/old")
    assert asked.provenance.revision == first
    await both.registry.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="moves"))
    await both.agreed()
    refused = await failure(generate(both.follower, "moves"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_watchers_of_a_follower_are_told(both: Pair) -> None:
    await both.agreed()
    watch = both.follower.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    while (await watch.read()).event != pb.ADAPTER_EVENT_SYNCED:
        pass
    first = (await both.push("watched", 15)).adapter.revision
    second = (await both.push("watched", 16, allow_replace=True)).adapter.revision
    await both.registry.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="watched"))
    told = [await watch.read() for _ in range(4)]
    assert [(each.event, each.adapter.revision) for each in told[:2]] == [
        (pb.ADAPTER_EVENT_PUBLISHED, first),
        (pb.ADAPTER_EVENT_REPLACED, second),
    ]
    assert {each.event for each in told[2:]} == {pb.ADAPTER_EVENT_DELETED}
    watch.cancel()


async def test_a_cut_off_follower_serves_what_it_knows_and_doubts_the_rest(both: Pair) -> None:
    await both.push("known", 4)
    await both.agreed()
    before = await generate(both.follower, "known")
    both.proxy.refuse()
    await until(lambda: _cut(both))
    assert (await generate(both.follower, "known")).text == before.text
    await both.push("published-meanwhile", 5)
    refused = await failure(generate(both.follower, "published-meanwhile"))
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert refused.metadata["cause"] == "registry_away"
    assert refused.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    assert (await both.facts()).lag.ToTimedelta().total_seconds() > 0
    assert "veneer_registry_connected 0.0" in await both.follower.metrics()
    both.proxy.heal()
    await both.agreed()
    await generate(both.follower, "published-meanwhile")


async def _cut(both: Pair) -> bool:
    return not (await both.facts()).connected


@pytest.mark.push
async def test_a_half_open_connection_is_noticed(both: Pair) -> None:
    await both.agreed()
    both.proxy.freeze()
    await until(lambda: _cut(both))
    await both.push("behind-the-ice", 6)
    both.proxy.heal()
    await both.agreed()
    await generate(both.follower, "behind-the-ice")


async def test_changes_are_passed_on_with_their_errors(both: Pair) -> None:
    folder = both.adapter(7)
    answer = await both.follower.push(folder, "passed-on")
    assert answer.published
    await both.agreed()
    await generate(both.follower, "passed-on")
    assert "passed-on" in {
        each.name
        for each in (
            await both.registry.adapters.ListAdapters(pb.ListAdaptersRequest())
        ).adapters
    }
    refused = await failure(both.follower.push(both.adapter(8), "passed-on"))
    assert refused.reason == "ADAPTER_EXISTS"
    history = await both.follower.adapters.GetHistory(pb.GetHistoryRequest(name="passed-on"))
    assert [entry.event for entry in history.entries] == ["published"]
    await both.follower.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="passed-on"))
    await both.agreed()
    assert (await failure(generate(both.follower, "passed-on"))).reason == "ADAPTER_NOT_FOUND"


@pytest.mark.push
async def test_what_a_silent_registry_does_not_answer_ends_with_an_error(
    both: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay half open: no call of a follower's client may wait for ever."""
    monkeypatch.setattr(replication_service, "AWAY_S", 0.4)
    large = make_adapter(tmp_path / "large", rank=1024)  # more than sockets hold
    assert (await both.follower.push(large, "before-the-ice")).published
    await both.agreed()
    both.proxy.freeze()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await both.follower.push(both.adapter(17), "into-the-ice")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await both.follower.push(large, "into-the-ice")
        # INTERNAL: a client that is writing sees no more than that (`failures.write_broke`).
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
        download = pb.DownloadAdapterRequest(name="before-the-ice")
        refused = await failure(both.follower.adapters.DownloadAdapter(download))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    finally:
        both.proxy.heal()
    await both.agreed()
    assert (await both.follower.push(both.adapter(17), "into-the-ice")).published


def not_loaded(answer: Any) -> list[str]:
    """The warnings that say so."""
    return [each for each in answer.warnings if "not loaded here" in each]


async def tier_at_registry(both: Pair, name: str) -> int:
    """It has an engine here, and is not to load what a follower was asked to load."""
    found = await both.registry.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
    return int(found.adapter.tier)


async def test_what_is_pushed_to_a_follower_is_loaded_there(both: Pair) -> None:
    await both.agreed()
    answer = await both.follower.push(both.adapter(20), "warm", activate=True)
    assert (answer.published, not_loaded(answer)) == (True, [])
    assert answer.adapter.tier == inference_pb2.TIER_DEVICE
    assert await tier_at_registry(both, "warm") == inference_pb2.TIER_DISK
    first = await generate(both.follower, "warm")
    assert first.provenance.tier == inference_pb2.TIER_DEVICE
    assert first.provenance.revision == answer.adapter.revision
    again = await both.follower.push(both.adapter(20), "warm", activate=True)
    assert (again.published, again.adapter.tier) == (False, inference_pb2.TIER_DEVICE)
    refused = await failure(
        both.follower.push(both.adapter(20), "warm", activate=True, validate_only=True)
    )
    assert refused.metadata["field"] == "spec.activate"


async def test_what_is_registered_by_a_follower_is_loaded_there(both: Pair) -> None:
    await both.agreed()
    request = pb.RegisterAdapterRequest(
        name="fetched-warm", uri=both.adapter(21).as_uri(), activate=True
    )
    answer = await both.follower.adapters.RegisterAdapter(request)
    assert answer.adapter.tier == inference_pb2.TIER_DEVICE
    assert await tier_at_registry(both, "fetched-warm") == inference_pb2.TIER_DISK


async def test_a_publication_stands_although_it_cannot_be_loaded(
    both: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*args: Any, **options: Any) -> None:
        raise AdapterBudgetExceeded("pins leave no room: evict one")

    await both.agreed()
    with monkeypatch.context() as patched:
        patched.setattr(both.follower.engine, "activate", full)
        answer = await both.follower.push(both.adapter(22), "too-many", activate=True)
    assert answer.published
    (warning,) = not_loaded(answer)
    assert warning.endswith(": pins leave no room: evict one")
    found = await generate(both.follower, "too-many")
    assert found.provenance.revision == answer.adapter.revision


async def test_a_publication_waits_for_the_followers_that_are_alive(both: Pair) -> None:
    await both.agreed()
    everybody = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    answer = await both.push("everywhere", 9, wait=everybody)
    assert (answer.replicas.live, answer.replicas.applied) == (1, 1)
    assert answer.replicas.enough
    assert (await generate(both.follower, "everywhere")).provenance.revision == (
        answer.adapter.revision
    )
    second = await both.push("everywhere", 10, allow_replace=True, wait=everybody)
    back = await both.registry.adapters.UpdateAdapter(
        pb.UpdateAdapterRequest(
            name=f"everywhere@{answer.adapter.revision}", current=True, wait=everybody
        )
    )
    assert second.replicas.enough
    assert back.replicas.enough
    found = await generate(both.follower, "everywhere")
    assert found.provenance.revision == answer.adapter.revision


async def test_a_session_keeps_its_revision_on_every_replica(both: Pair) -> None:
    first = (await both.push("session", 23)).adapter.revision
    await both.agreed()
    async with (
        AsyncClient(both.follower.addresses["grpc"]) as here,
        AsyncClient(both.registry.addresses["grpc"]) as there,
        here.adapter("session") as kept,
    ):
        second = (await both.push("session", 24, allow_replace=True)).adapter.revision
        await both.agreed()
        found = [
            await kept.generate(Text("Hello"), max_tokens=4),
            await there.generate(Text("Hello"), adapter=kept.ref, max_tokens=4),
        ]
        assert {each.provenance.revision for each in found} == {first}
        newest = await here.generate(Text("Hello"), adapter="session", max_tokens=4)
        assert newest.provenance.revision == second


async def test_what_the_registry_fetches_waits_for_followers_too(both: Pair) -> None:
    await both.agreed()
    async with AsyncClient(both.follower.addresses["grpc"]) as client:
        uri, everybody = f"file://{both.adapter(17)}", WaitReplicas.ALL
        checked = await client.register(uri, "by-uri", validate_only=True)
        assert checked.replicas is None
        pushed = await client.register(uri, "by-uri", wait_replicas=everybody)
    assert pushed.replicas == ReplicasReached(1, 1, True)
    found = await generate(both.follower, "by-uri")
    assert found.provenance.revision == pushed.adapter.revision


async def test_a_publication_is_answered_although_a_follower_is_cut_off(both: Pair) -> None:
    await both.agreed()
    both.proxy.refuse()
    await until(lambda: _cut(both))
    soon = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    soon.at_most.FromMilliseconds(50)
    answer = await both.push("without-it", 11, wait=soon)
    assert answer.published
    assert (answer.replicas.live, answer.replicas.applied) == (1, 0)
    assert not answer.replicas.enough
    both.proxy.heal()
    await both.agreed()


async def test_an_interrupted_fetch_resumes(both: Pair) -> None:
    folder = both.folders / "large"
    make_adapter(folder, seed=13, rank=64)
    size = sum(path.stat().st_size for path in folder.iterdir())
    await both.registry.push(folder, "large")
    await both.agreed()
    before = both.proxy.forwarded
    both.proxy.cut_after(size // 2)
    answer = await generate(both.follower, "large")
    assert answer.provenance.tier == inference_pb2.TIER_REMOTE
    assert both.proxy.forwarded - before < size * 2


async def test_one_fetch_for_all_who_ask(both: Pair) -> None:
    await both.push("popular", 14)
    await both.agreed()
    asked = await asyncio.gather(*(generate(both.follower, "popular") for _ in range(8)))
    assert len({each.text for each in asked}) == 1
    page = await both.follower.metrics()
    fetched = [line for line in page.splitlines() if 'fetches_total{result="ok"}' in line]
    await generate(both.follower, "popular")
    assert fetched[0] in await both.follower.metrics()
    assert sum(each.provenance.tier == inference_pb2.TIER_REMOTE for each in asked) >= 1


@pytest.mark.push
async def test_the_registry_comes_back_from_a_backup(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    folders = [make_adapter(tmp_path / f"adapter{seed}", seed=seed) for seed in range(3)]
    data = tmp_path / "registry"
    async with running(base_folder, front_cache, data) as registry:
        kept = (await registry.push(folders[0], "kept")).adapter.revision
    shutil.copytree(data / "data", tmp_path / "backup")
    async with Proxy("127.0.0.1:1") as proxy:  # noqa: SIM117 - it is given a target between
        async with running(base_folder, front_cache, data) as registry:
            proxy.target = registry.addresses["grpc"]
            async with running(
                base_folder,
                front_cache,
                tmp_path / "follower",
                role="engine",
                registry=proxy.address,
            ) as follower:
                both = Pair(registry, follower, proxy, tmp_path)
                await registry.push(folders[1], "kept", allow_replace=True)
                await registry.push(folders[2], "lost")
                await both.agreed()
                registry.app.stop()
                await registry.task
                shutil.rmtree(data / "data")
                shutil.copytree(tmp_path / "backup", data / "data")
                async with running(base_folder, front_cache, data) as restored:
                    proxy.target = restored.addresses["grpc"]
                    both.registry = restored
                    await both.agreed()
                    found = await generate(follower, "kept")
                    assert found.provenance.revision == kept
                    assert (await failure(generate(follower, "lost"))).reason == (
                        "ADAPTER_NOT_FOUND"
                    )


@pytest.mark.push
async def test_whoever_may_not_change_adapters_may_not_by_a_follower(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    file, token = tmp_path / "keys.toml", tmp_path / "token"

    def key(name: str, role: Role, tenant: str = "default") -> str:
        return add_key(file, name=name, tenant=tenant, roles=[role], expires=None).key

    token.write_text(key("follower", "operator") + "\n")
    publisher, user = key("publisher", "publisher"), key("user", "inference")
    far, stranger = key("far", "publisher", "far"), key("stranger", "inference", "far")
    keys = {"keys_file": str(file)}
    folder = make_adapter(tmp_path / "one", seed=1)
    async with (
        running(base_folder, front_cache, tmp_path / "registry", **keys) as registry,
        running(
            base_folder,
            front_cache,
            tmp_path / "follower",
            role="engine",
            registry=registry.addresses["grpc"],
            registry_key_file=str(token),
            **keys,
        ) as follower,
    ):

        async def push(who: str, name: str) -> Any:
            messages = upload(folder, name)
            return await follower.adapters.UploadAdapter(messages, metadata=bearer(who))

        async def ask(who: str, name: str) -> Any:
            request = prompt(adapter=name)
            return await follower.inference.Generate(request, metadata=bearer(who))

        assert (await failure(push(user, "one"))).reason == "PERMISSION_DENIED"
        await push(publisher, "one")
        await push(far, "theirs")
        await until(lambda: _answers(ask(user, "one")))
        await until(lambda: _answers(ask(stranger, "theirs")))
        assert (await failure(ask(stranger, "one"))).reason == "ADAPTER_NOT_FOUND"
        assert (await failure(ask(user, "theirs"))).reason == "ADAPTER_NOT_FOUND"
        history = await follower.adapters.GetHistory(
            pb.GetHistoryRequest(), metadata=bearer(publisher)
        )
        assert [entry.actor for entry in history.entries] == ["publisher"]


@pytest.mark.push
async def test_a_tenant_that_another_registry_made_is_served_by_followers_of_this_one(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two registries on one catalog and store. Also after this one lost its data folder."""
    file, token = tmp_path / "keys.toml", tmp_path / "token"

    def key(name: str, role: Role, tenant: str) -> str:
        return add_key(file, name=name, tenant=tenant, roles=[role], expires=None).key

    operator = key("operator", "operator", "default")
    token.write_text(operator + "\n")
    publisher, user = key("publisher", "publisher", "far"), key("user", "inference", "far")
    keys = {"keys_file": str(file)}
    with services_running() as services:
        for name, value in services.s3.environment().items():
            monkeypatch.setenv(name, value)
        shared = {
            **keys,
            "store": f"s3://{BUCKET}/own",
            "catalog": services.postgres.url,
            "catalog_password_file": str(services.postgres.password_file),
        }

        def registry(data: str) -> AbstractAsyncContextManager[Front]:
            return running(base_folder, front_cache, tmp_path / data, **shared)

        async def followed(owner: Front, data: str, adapter: str) -> None:
            async with running(
                base_folder,
                front_cache,
                tmp_path / data,
                role="engine",
                registry=owner.addresses["grpc"],
                registry_key_file=str(token),
                **keys,
            ) as follower:
                request = prompt(adapter=adapter)
                await until(
                    lambda: _answers(
                        follower.inference.Generate(request, metadata=bearer(user))
                    )
                )

        async with registry("a") as one:
            async with registry("b") as other:
                await one.adapters.UploadAdapter(
                    upload(make_adapter(tmp_path / "one", seed=1), "one"),
                    metadata=bearer(publisher),
                )
                await followed(other, "follower", "one")
                visiting = (*bearer(operator), ("veneer-tenant", "far"))
                listed = await other.adapters.ListAdapters(
                    pb.ListAdaptersRequest(), metadata=visiting
                )
                assert [each.name for each in listed.adapters] == ["one"]
            async with registry("c") as anew:
                await followed(anew, "another", "one")


async def _answers(call: Awaitable[Any]) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True


@pytest.mark.push
async def test_a_follower_starts_while_its_registry_is_away(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path / "registry") as registry:
        follow = {"role": "engine", "registry": registry.addresses["grpc"]}
        await registry.push(make_adapter(tmp_path / "one", seed=1), "one")
        async with running(
            base_folder, front_cache, tmp_path / "follower", **follow
        ) as follower:
            before = await generate(follower, "one")
    async with running(base_folder, front_cache, tmp_path / "follower", **follow) as follower:
        assert (await failure(generate(follower, "two"))).code is grpc.StatusCode.UNAVAILABLE
        assert (await generate(follower, "one")).text == before.text


@pytest.mark.push
@pytest.mark.parametrize("view", ["none", "damaged", "too old"])
async def test_a_follower_that_knows_no_names_is_not_ready_until_it_meets_its_registry(
    base_folder: Path,
    front_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    view: str,
) -> None:
    """A rollout would otherwise replace servers that answer by one that refuses everything."""
    monkeypatch.setattr(roles, "_NEWER_VIEW_S", 0.01)
    monkeypatch.setattr(roles, "_TOLD_S", 0.01)
    waited: list[float] = []
    synced = RegistryLink.synced

    async def waiting(link: RegistryLink, within_s: float) -> bool:
        found = await synced(link, within_s)
        waited.append(within_s)
        return found

    monkeypatch.setattr(RegistryLink, "synced", waiting)
    place = f"127.0.0.1:{free_port()}"
    data, follow = tmp_path / "follower", {"role": "engine", "registry": place}
    if view != "none":
        async with (
            running(base_folder, front_cache, tmp_path / "registry", listen=place),
            running(base_folder, front_cache, data, **follow) as follower,
        ):
            await until(lambda: _serving(follower))
        file = data / "data/follower/names/default/catalog.sqlite"
        if view == "damaged":
            file.write_bytes(file.read_bytes()[:4096] + bytes(4096))
        else:
            follow["max_registry_lag"] = "0.001"
    waited.clear()
    async with running(base_folder, front_cache, data, loading=True, **follow) as follower:
        follower.engine.load_gate.set()
        await until(lambda: _is(len(waited) > 5))
        assert not await _serving(follower)
        assert not follower.ready.is_set()
        async with running(base_folder, front_cache, tmp_path / "registry", listen=place):
            await follower.ready.wait()
            await until(lambda: _serving(follower))


@pytest.mark.push
async def test_what_a_follower_has_acknowledged_outlives_kill_9(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """A replace and a delete that all followers have; then this one starts again, without its
    registry, from what its disk had at that moment."""
    wait = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    async with pair(base_folder, front_cache, tmp_path) as both:
        for name in ("replaced", "deleted"):
            await both.push(name, 1)
        await both.agreed()
        for name in ("replaced", "deleted"):
            await generate(both.follower, name)
        for number in range(3):
            killed = tmp_path / f"killed-{number}"
            if number == 2:
                answer = await both.registry.adapters.DeleteAdapter(
                    pb.DeleteAdapterRequest(name="deleted", wait=wait)
                )
            else:
                answer = await both.push("replaced", 2 + number, allow_replace=True, wait=wait)
                now = answer.adapter.revision
            assert (answer.replicas.live, answer.replicas.applied) == (1, 1)
            shutil.copytree(tmp_path / "follower/data", killed / "data")
            nowhere = {"role": "engine", "registry": f"127.0.0.1:{free_port()}"}
            async with running(base_folder, front_cache, killed, **nowhere) as again:
                found = await asyncio.gather(
                    generate(again, "replaced"), return_exceptions=True
                )
                if isinstance(found[0], grpc.aio.AioRpcError):
                    assert found[0].code() is grpc.StatusCode.UNAVAILABLE
                else:
                    assert found[0].provenance.revision == now
                if number == 2:
                    gone = await failure(generate(again, "deleted"))
                    assert gone.code is grpc.StatusCode.UNAVAILABLE


async def _is(found: bool) -> bool:
    return found


async def _serving(server: Front) -> bool:
    health = health_pb2_grpc.HealthStub(server.channel)
    answer = await health.Check(
        health_pb2.HealthCheckRequest(service="veneer.v1.InferenceService")
    )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.push
async def test_a_registry_that_has_just_started_does_not_know_its_followers_yet(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    data = tmp_path / "registry"
    async with running(base_folder, front_cache, data, role="registry") as registry:
        await registry.push(make_adapter(tmp_path / "one", seed=1), "one")
    wait = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    wait.at_most.FromMilliseconds(1)
    async with running(base_folder, front_cache, data, role="registry") as registry:
        asked = pb.UpdateAdapterRequest(name="one", labels={"a": "b"}, wait=wait)
        answer = await registry.adapters.UpdateAdapter(asked)
        assert not answer.replicas.live
        assert not answer.replicas.enough


@pytest.mark.push
async def test_a_registry_generates_nothing_and_says_who_does(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(
        base_folder, front_cache, tmp_path / "registry", role="registry"
    ) as registry:
        await registry.push(make_adapter(tmp_path / "one", seed=1), "one")
        refused = await failure(generate(registry, "one"))
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refused.metadata["role"] == "registry"
        refused = await failure(
            registry.adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="one"))
        )
        assert refused.metadata["role"] == "registry"
        # Not that budgets for an engine do not fit this machine.
        for size in (1 << 20, 1 << 50):
            budgets = pb.UpdateBudgetsRequest(host_cache_bytes=size)
            refused = await failure(registry.adapters.UpdateBudgets(budgets))
            assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
            assert refused.metadata["role"] == "registry"
        refused = await failure(
            registry.push(make_adapter(tmp_path / "two", seed=2), "two", activate=True)
        )
        assert refused.metadata["role"] == "registry"
        missing = await failure(registry.adapters.GetAdapter(pb.GetAdapterRequest(name="two")))
        assert missing.reason == "ADAPTER_NOT_FOUND"
        info = await registry.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        assert (info.role, info.device) == ("registry", "none")
        assert "veneer_ready 1.0" in await registry.metrics()
        async with AsyncClient(registry.addresses["grpc"]) as client:
            assert await client.health() is ServingStatus.SERVING
        await registry.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="one"))


@pytest.mark.push
async def test_a_torn_file_of_an_earlier_run_is_noticed(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path / "registry") as registry:
        await registry.push(make_adapter(tmp_path / "one", seed=1), "one")
        at = registry.addresses["grpc"]
        follow = {"role": "engine", "registry": at}
        async with running(
            base_folder, front_cache, tmp_path / "follower", **follow
        ) as follower:
            whole = await generate(follower, "one")
        (content,) = (tmp_path / "follower/data/follower/weights").iterdir()
        torn = content / "adapter_model.safetensors"
        torn.write_bytes(torn.read_bytes()[:-8] + bytes(8))
        async with running(
            base_folder, front_cache, tmp_path / "follower", **follow
        ) as follower:
            again = await generate(follower, "one")
            assert again.text == whole.text
            assert again.provenance.tier == inference_pb2.TIER_REMOTE
            assert "veneer_adapter_disk_cache_damaged_total 1.0" in await follower.metrics()
        async with running(
            base_folder, front_cache, tmp_path / "follower", **follow
        ) as follower:
            kept = await generate(follower, "one")
            assert kept.provenance.tier == inference_pb2.TIER_DISK


@pytest.mark.push
async def test_a_follower_shows_renewed_keys_without_a_restart(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    file, token = tmp_path / "keys.toml", tmp_path / "token"

    def key(name: str) -> str:
        return add_key(file, name=name, tenant="default", roles=["operator"], expires=None).key

    first, second = key("first"), key("second")
    token.write_text(first)
    keys = {"keys_file": str(file)}
    follow = {"role": "engine", "registry_key_file": str(token), **keys}
    places = [tmp_path / "registry", tmp_path / "follower"]
    async with (
        running(base_folder, front_cache, places[0], **keys) as registry,
        Proxy(registry.addresses["grpc"]) as proxy,
        running(
            base_folder, front_cache, places[1], registry=proxy.address, **follow
        ) as follower,
    ):

        async def told(front: Front, who: str) -> Any:
            request = server_pb2.GetServerInfoRequest()
            return await front.server.GetServerInfo(request, metadata=bearer(who))

        async def connected() -> bool:
            return bool((await told(follower, second)).replication.connected)

        async def revoked() -> bool:
            try:
                await told(registry, first)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    raise
                return True
            return False

        await until(connected)
        token.write_text(second)
        revoke_key(file, first)
        await until(revoked)
        proxy.cut()
        messages = upload(make_adapter(tmp_path / "one", seed=1), "one")
        await registry.adapters.UploadAdapter(messages, metadata=bearer(second))
        request = prompt(adapter="one")

        async def answered() -> bool:
            return await _known(follower.inference.Generate(request, metadata=bearer(second)))

        await until(answered)


async def _known(call: Awaitable[Any]) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
            raise
        return False
    return True


@pytest.mark.push
async def test_a_follower_trusts_a_renewed_authority_without_a_restart(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    pki, trusted = Pki(tmp_path / "pki"), tmp_path / "ca.pem"
    shutil.copy(pki.ca_file, trusted)
    tls = {"tls_cert": pki.cert, "tls_key": pki.key}
    follow = {"role": "engine", "registry_ca": str(trusted)}
    places = [tmp_path / "registry", tmp_path / "follower"]
    async with (
        running(
            base_folder,
            front_cache,
            places[0],
            credentials=grpc.ssl_channel_credentials(trusted.read_bytes()),
            **tls,
        ) as registry,
        Proxy(registry.addresses["grpc"]) as proxy,
        running(
            base_folder, front_cache, places[1], registry=proxy.address, **follow
        ) as follower,
    ):

        async def pushed(seed: int) -> bool:
            folder = make_adapter(tmp_path / f"adapter{seed}", seed=seed)
            try:
                await follower.push(folder, "one", allow_replace=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            return True

        await until(lambda: pushed(1))
        other = Pki(tmp_path / "other")
        shutil.copy(other.key, pki.key)
        shutil.copy(other.cert, pki.cert)
        shutil.copy(other.ca_file, trusted)
        proxy.cut()
        await until(lambda: pushed(2))
        await until(lambda: _known(generate(follower, "one")))
