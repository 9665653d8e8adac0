"""What tenants have to themselves, what they share, and who may act in another's place."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import httpx
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.errors import AdapterNotFound, PermissionDenied
from veneer_registry.index import not_found
from veneer_registry.lock import OwnerLock
from veneer_registry.registry import Registry
from veneer_server import logs
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.caller import Caller as CallerValue
from veneer_server.access.edit_keys import add_key
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.operate.store_command import verify
from veneer_server.serving import tenants as tenants_module
from veneer_server.serving.gate import CallContext, Gate
from veneer_server.serving.visible import Visible, VisibleAdapter
from veneer_server.telemetry.metrics import Metrics
from veneer_server.wire.messages import AdapterLoaded, split_key

from tests.refused import refused
from tests.unit.registry.kit import BASE
from tests.unit.server.access.tenants_kit import Caller, Shared, shared
from tests.unit.server.rpc.fake_engine import fake_tokens
from tests.unit.server.rpc.front_harness import (
    failure,
    make_adapter,
    prompt,
    running,
    until,
    upload,
)

GET = "/veneer.v1.AdapterService/GetAdapter"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    async with shared(base_folder, front_cache, tmp_path_factory.mktemp("tenants")) as made:
        yield made


@pytest.fixture
def here(request: pytest.FixtureRequest) -> str:
    """A tenant of the test's own."""
    return f"t{abs(hash(request.node.name)) % 10**8}"


async def seen(caller: Caller, name: str) -> grpc.StatusCode:
    """What a caller is told of a name."""
    try:
        await caller.call("GetAdapter", name=name)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_prefixes_are_shared_within_a_tenant_only(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """How many prompt tokens were cached would say that another tenant has asked the same. That
    a scope keeps prefixes apart is shown by the scheduler's histories."""
    file = tmp_path / "keys.toml"
    keys = [
        add_key(file, name=name, tenant=tenant, roles=["inference"], expires=None).key
        for name, tenant in (("one", "a"), ("two", "a"), ("three", "b"))
    ]
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        keys_file=str(file),
        openai_listen="127.0.0.1:0",
    ) as front:
        for key in keys:
            metadata: Any = (("authorization", f"Bearer {key}"),)
            await front.inference.Generate(prompt(), metadata=metadata)
            async with httpx.AsyncClient(trust_env=False) as http:
                url = f"http://{front.addresses['openai']}/v1/completions"
                body = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 1}
                headers = {"authorization": f"Bearer {key}"}
                assert (await http.post(url, json=body, headers=headers)).status_code == 200
        scopes = [request.cache_scope for request in front.engine.submitted]
        assert not (front.data_dir / "tenants").exists(), "the base alone opens no tenant"
    assert scopes == ["a", "a", "a", "a", "b", "b"]


# --------------------------------------------------------------------- names and copies


@pytest.mark.asyncio(loop_scope="module")
async def test_one_name_means_each_tenants_own_weights(
    server: Shared, here: str, tmp_path: Path
) -> None:
    one, two = server.caller(here), server.caller(f"{here}-2")
    digests = [
        (await caller.push(make_adapter(tmp_path / str(n), seed=n), "chat")).adapter
        for n, caller in enumerate((one, two))
    ]
    for caller, adapter in zip((one, two), digests, strict=True):
        answer = await caller.generate(adapter="chat", sampling=inference_pb2.SamplingOptions())
        assert answer.provenance.weights_digest == adapter.weights_digest
        key = f"{caller.tenant}:{adapter.weights_digest}"
        submitted = server.front.engine.submitted[-1]
        assert submitted.adapter is not None
        assert submitted.adapter.weights_digest == key
        assert submitted.adapter.digest == adapter.weights_digest
        expected = fake_tokens(
            adapter.weights_digest, submitted.prompt, submitted.sampling.seed, 4
        )
        assert list(answer.token_ids) == expected
    assert await one.names() == ["chat"]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_same_weights_are_a_copy_of_each(
    server: Shared, here: str, tmp_path: Path
) -> None:
    """What one evicts, deletes or uploads tells the other nothing."""
    folder = make_adapter(tmp_path / "a", seed=5)
    one, two = server.caller(here), server.caller(f"{here}-2")
    files = next(iter(upload(folder, "mine"))).spec
    await one.push(folder, "mine", activate=True)
    known = await two.call("GetUpload", spec=files)
    assert set(known.committed.values()) <= {0}, "it has to send all of it"
    await two.push(folder, "theirs")
    tiers = {"mine": 4, "theirs": 2}  # TIER_DEVICE, TIER_DISK
    for caller, name in ((one, "mine"), (two, "theirs")):
        got = await caller.call("GetAdapter", name=name)
        assert got.adapter.tier == tiers[name]
    watch = one.call("WatchAdapters")
    while (await watch.read()).event != adapters_pb2.ADAPTER_EVENT_SYNCED:
        pass
    for name in ("theirs", "again"):
        await two.push(folder, name, activate=True)
        await two.call("EvictAdapter", name=name)
        await two.call("DeleteAdapter", name=name)
    assert (await one.call("GetAdapter", name="mine")).adapter.tier == tiers["mine"]
    await one.call("EvictAdapter", name="mine")
    event = await watch.read()
    watch.cancel()
    assert (event.event, event.detail) == (adapters_pb2.ADAPTER_EVENT_EVICTED, "engine_ended")
    assert (await one.generate(adapter="mine")).provenance.adapter == "mine"


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_tenant_has_in_memory_is_stored_for_it_alone(
    server: Shared, here: str, tmp_path: Path
) -> None:
    """Else each change of one would be written into every tenant's catalog."""
    one, two = server.caller(here), server.caller(f"{here}-2")
    engine: Any = server.front.engine
    views = [TenantEngine(engine, each.tenant) for each in (one, two)]
    folder = make_adapter(tmp_path / "a", seed=3)
    digest = (await one.push(folder, "chat", activate=True)).adapter.weights_digest
    before = [view.residents_version for view in views]
    assert [view.resident() for view in views] == [[digest], []]
    await two.push(folder, "chat", activate=True)
    assert views[0].residents_version == before[0]
    assert views[1].residents_version != before[1]
    for view in views:
        assert [r.source.weights_digest for r in view.resident_set()] == [digest]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_thousand_events_of_another_reach_no_watch(
    server: Shared, here: str, tmp_path: Path
) -> None:
    """Nor do they push a watcher out of the events that the server keeps."""
    one, two = server.caller(here), server.caller(f"{here}-2")
    folders = [make_adapter(tmp_path / str(n), seed=n) for n in range(2)]
    await one.push(folders[0], "chat")
    watch = one.call("WatchAdapters")
    while True:
        event = await watch.read()
        if event.event == adapters_pb2.ADAPTER_EVENT_SYNCED:
            break
    since = event.sequence
    pushed = (await two.push(folders[0], "chat")).adapter
    theirs = f"{two.tenant}:{pushed.weights_digest}"
    for _ in range(1500):  # real publishes would take a minute
        server.front.engine.tell(AdapterLoaded(theirs, "disk", {}))
    await one.push(folders[1], "chat", allow_replace=True)
    event = await watch.read()
    watch.cancel()
    assert event.event == adapters_pb2.ADAPTER_EVENT_REPLACED
    assert event.sequence == since + 1
    assert event.adapter.weights_digest != pushed.weights_digest


# ----------------------------------------------------------------------------- sharing


@pytest.mark.asyncio(loop_scope="module")
async def test_a_shared_adapter_can_be_used_and_not_changed_by_others(
    server: Shared, here: str, tmp_path: Path
) -> None:
    owner, other = server.caller(here), server.caller(f"{here}-2")
    first = (await owner.push(make_adapter(tmp_path / "1", seed=1), "chat")).adapter
    await owner.call("SetAlias", alias="chat/prod", revision=first.revision)
    name = f"{here}/chat"
    for spec in (name, f"{name}/prod", f"{name}@{first.revision[:12]}", "chat"):
        assert await seen(other, spec) is grpc.StatusCode.NOT_FOUND
    shared = await owner.call("UpdateAdapter", name="chat", shared=True)
    assert (shared.adapter.shared, shared.adapter.tenant) == (True, "")
    await owner.generate(adapter="chat")

    got = (await other.call("GetAdapter", name=name)).adapter
    assert (got.name, got.tenant, got.shared) == (name, here, True)
    assert (got.revision, list(got.aliases)) == (first.revision, [f"{name}/prod"])
    assert (got.etag, got.leases, got.HasField("last_used")) == ("", 0, False)
    listed = (await other.call("ListAdapters", name_prefix=here)).adapters
    assert [(a.name, a.tenant) for a in listed] == [(name, here)]
    aliases = [a.alias for a in (await other.call("ListAliases")).aliases]
    assert f"{name}/prod" in aliases
    found = (await other.call("ListAliases", name=name)).aliases
    assert [a.alias for a in found] == [f"{name}/prod"]
    assert (await other.call("GetHistory", name=name)).entries == []
    plan = await other.call("PlanCapacity", like=name)
    assert plan.adapters.parameters == first.parameters
    models = {m["id"]: m for m in (await other.http("GET", "/v1/models")).json()["data"]}
    assert models[name]["owned_by"] == models[f"{name}/prod"]["owned_by"] == here
    assert models[name]["root"] == f"{name}@{first.revision[:12]}"
    assert "chat" not in models
    for spec in (name, f"{name}/prod"):
        model = (await other.http("GET", f"/v1/models/{spec}")).json()
        assert (model["id"], model["owned_by"]) == (spec, here)
    assert (await owner.http("GET", "/v1/models/chat")).json()["owned_by"] == "veneer"
    for spec in (name, f"{name}/prod", f"{name}@{first.revision[:12]}"):
        answer = await other.generate(adapter=spec)
        assert answer.provenance.weights_digest == first.weights_digest
        assert answer.provenance.adapter == name
        submitted = server.front.engine.submitted[-1]
        assert submitted.adapter is not None
        assert submitted.adapter.weights_digest == f"{here}:{first.weights_digest}"
        assert submitted.cache_scope == other.tenant, "its own prompts stay its own"
        for path, body in HTTP.items():
            http = await other.http("POST", path, model=spec, **body)
            assert http.status_code == 200, http.text

    for rpc, fields in (
        ("ActivateAdapter", {"name": name}),
        ("EvictAdapter", {"name": name}),
        ("DeleteAdapter", {"name": name}),
        ("UpdateAdapter", {"name": name, "retain": 1}),
        ("UpdateAdapter", {"name": name, "shared": False}),
        ("SetAlias", {"alias": f"{name}/prod", "remove": True}),
        ("DownloadAdapter", {"name": name}),
    ):
        told = await failure(other.call(rpc, **fields))
        assert told.code is grpc.StatusCode.PERMISSION_DENIED
        assert told.metadata == {"adapter": "chat", "tenant": here, "cause": "tenant"}

    for wrong, near in (
        (f"{name}s", name),
        (f"{name}/prods", f"{name}/prod"),
        (f"{name}s@{first.revision[:12]}", name),
    ):
        told = await failure(other.call("GetAdapter", name=wrong))
        assert told.reason == "ADAPTER_NOT_FOUND"
        assert told.metadata["did_you_mean"] == near


HTTP: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
    },
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello"}]},
    "/inference/v1/generate": {"token_ids": [1000], "sampling_params": {"max_tokens": 1}},
    "/api/generate": {"prompt": "Hello", "options": {"num_predict": 1}},
    "/api/show": {},
    "/tokenize": {"prompt": "Hello"},
}


@pytest.mark.asyncio(loop_scope="module")
async def test_nobody_plants_a_name_that_others_call(
    server: Shared, here: str, tmp_path: Path
) -> None:
    """Not where they never had the name, nor where they delete theirs."""
    planter, other = server.caller(here), server.caller(f"{here}-2")
    await planter.push(make_adapter(tmp_path / "1", seed=1), f"{here}-x")
    await planter.call("UpdateAdapter", name=f"{here}-x", shared=True)

    async def refused_everywhere() -> None:
        for spec in (f"{here}-x", f"{here}-x/prod"):
            told = await failure(other.generate(adapter=spec))
            assert told.code is grpc.StatusCode.NOT_FOUND
            meant = told.metadata["did_you_mean"]
            assert meant == f"{here}/{spec}"
            assert meant in told.message
            for path, body in HTTP.items():
                http = await other.http("POST", path, model=spec, **body)
                assert http.status_code == 404
                assert meant in http.text
            assert (await other.http("GET", f"/v1/models/{spec}")).status_code == 404

    await refused_everywhere()
    own = (await other.push(make_adapter(tmp_path / "2", seed=2), f"{here}-x")).adapter
    answer = await other.generate(adapter=f"{here}-x")
    assert answer.provenance.weights_digest == own.weights_digest
    listed = (await other.call("ListAdapters", name_prefix=here)).adapters
    assert [a.name for a in listed] == [f"{here}-x", f"{here}/{here}-x"]
    await other.call("DeleteAdapter", name=f"{here}-x")
    await refused_everywhere()


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_tenant_accepts_it_calls_by_its_plain_name(
    server: Shared, here: str, tmp_path: Path
) -> None:
    """At once when the keys file is saved; of several, the first that it lists."""
    one, two, home = (server.caller(f"{here}-{n}") for n in (1, 2, 3))
    digests = {}
    for n, (caller, name) in enumerate(
        [(one, "code"), (one, "sql"), (two, "code"), (two, "sql")]
    ):
        pushed = await caller.push(make_adapter(tmp_path / str(n), seed=n), name)
        digests[caller.tenant, name] = pushed.adapter.weights_digest
        await caller.call("UpdateAdapter", name=name, shared=True)

    async def means(spec: str, owner: Caller | None, name: str = "code") -> None:
        if owner is None:
            assert await seen(home, spec) is grpc.StatusCode.NOT_FOUND
            return
        answer = await home.generate(adapter=spec)
        assert answer.provenance.weights_digest == digests[owner.tenant, name]

    before = server.keys.read_text()

    def accept(*listed: str) -> None:
        text = f"\n[tenants.{home.tenant}]\naccepts = {json.dumps(listed)}\n"
        server.keys.write_text(before + text)

    await means("code", None)
    accept(f"{two.tenant}/code", one.tenant)
    await means("code", two)
    await means("sql", one, "sql")
    await means(f"{one.tenant}/code", one)
    listed = (await home.call("ListAdapters")).adapters
    names = {each.name for each in listed if each.tenant.startswith(here)}
    assert names == {"code", "sql", f"{one.tenant}/code", f"{two.tenant}/sql"}
    assert (await home.http("GET", "/v1/models/code")).json()["owned_by"] == two.tenant
    await one.call("SetAlias", alias="sql/prod", revision=await _revision(one, "sql"))
    await means("sql/prod", one, "sql")
    told = await failure(home.call("DeleteAdapter", name="code"))
    assert told.code is grpc.StatusCode.PERMISSION_DENIED
    accept(f"{one.tenant}/sql")
    await means("code", None)
    await means("sql", one, "sql")
    await one.call("UpdateAdapter", name="sql", shared=False)
    await means("sql", None)
    # What begins with a tenant's name is that tenant's, whoever else is accepted.
    await one.push(make_adapter(tmp_path / "trap", seed=9), one.tenant)
    await one.call("UpdateAdapter", name=one.tenant, shared=True)
    accept(one.tenant)
    await means(one.tenant, None)
    server.keys.write_text(before)


async def _revision(caller: Caller, name: str) -> str:
    revision: str = (await caller.call("GetAdapter", name=name)).adapter.revision
    return revision


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenants_name_and_an_alias_are_never_confused(
    server: Shared, here: str, tmp_path: Path
) -> None:
    """``a/b`` is an alias of one's own ``a``, whatever tenant ``a`` shares. A name like that
    of a tenant which shares adapters is not given to a new adapter."""
    owner, old, new = (server.caller(f"{here}-{n}") for n in (1, 2, 3))
    folder = make_adapter(tmp_path / "0", seed=0)
    name = owner.tenant
    await old.push(make_adapter(tmp_path / "old", seed=7), name)
    await owner.push(folder, "code")
    await owner.call("UpdateAdapter", name="code", shared=True)
    assert await seen(old, f"{name}/code") is grpc.StatusCode.NOT_FOUND
    assert await seen(new, f"{name}/code") is grpc.StatusCode.OK
    own = await _revision(old, name)
    await old.call("SetAlias", alias=f"{name}/code", revision=own)
    assert (await old.call("GetAdapter", name=f"{name}/code")).adapter.revision == own
    listed = (await old.call("ListAdapters", name_prefix=here)).adapters
    assert [(each.name, each.tenant) for each in listed] == [(name, "")]
    told = await failure(new.push(folder, name))
    assert (told.code, told.metadata["cause"]) == (grpc.StatusCode.ALREADY_EXISTS, "tenant")
    await old.push(folder, name, allow_replace=True)
    await owner.push(folder, name)  # its own name
    await owner.call("UpdateAdapter", name="code", shared=False)
    await new.push(folder, name)  # nothing is shared under it


@pytest.mark.asyncio(loop_scope="module")
async def test_several_tenants_share_one_name(
    server: Shared, here: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "1", seed=1)
    callers = [server.caller(f"{here}-{n}") for n in range(4)]
    for caller in callers:
        await caller.push(folder, here)
    calls = [caller.call("UpdateAdapter", name=here, shared=True) for caller in callers]
    await asyncio.gather(*calls)
    listed = (await callers[0].call("ListAdapters", name_prefix=here)).adapters
    assert [each.name for each in listed] == [here, *(f"{here}-{n}/{here}" for n in (1, 2, 3))]


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_outlast_the_end_of_sharing(
    server: Shared, here: str, tmp_path: Path
) -> None:
    owner, other = server.caller(here), server.caller(f"{here}-2")
    name = f"{here}-chat"
    await owner.push(make_adapter(tmp_path / "1", seed=1), name)
    await owner.call("UpdateAdapter", name=name, shared=True)
    engine = server.front.engine
    engine.pace = asyncio.Semaphore(1)
    called = f"{here}/{name}"
    stream = other.call("GenerateStream", prompt="Hello", adapter=called)
    await stream.read()
    await owner.call("UpdateAdapter", name=name, shared=False)
    again = await failure(other.call("GenerateStream", prompt="Hi", adapter=called))
    assert again.code is grpc.StatusCode.NOT_FOUND
    await owner.call("DeleteAdapter", name=name)
    for _ in range(1000):
        engine.pace.release()
    while not (message := await stream.read()).HasField("final"):
        pass
    engine.pace = None
    assert message.final.provenance.adapter == called


@pytest.mark.asyncio(loop_scope="module")
async def test_a_list_of_own_and_shared_ones_comes_in_pages(
    server: Shared, here: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "1", seed=1)
    owner, other = server.caller(here), server.caller(f"{here}-2")
    for n in range(0, 12, 2):
        await owner.push(folder, f"{here}-{n:02}", labels={"team": str(n % 4)})
        await owner.call("UpdateAdapter", name=f"{here}-{n:02}", shared=True)
    await owner.push(folder, f"{here}-secret")
    for n in range(1, 12, 3):
        await other.push(folder, f"{here}-{n:02}", labels={"team": "x"})
    found, token = [], ""
    while True:
        page = await other.call("ListAdapters", page_size=2, page_token=token, name_prefix=here)
        found += [(each.name[-2:], each.tenant == here) for each in page.adapters]
        token = page.next_page_token
        if not token:
            break
    own = [(f"{n:02}", False) for n in range(1, 12, 3)]
    theirs = [(f"{n:02}", True) for n in range(0, 12, 2)]
    assert found == own + theirs, "what others share is called by its tenant"
    labelled = await other.call("ListAdapters", name_prefix=here, labels={"team": "0"})
    assert [each.name[-2:] for each in labelled.adapters] == ["00", "04", "08"]


def test_a_name_deleted_while_a_list_is_made_is_listed_once() -> None:
    """FAKE registries: "chat" is its tenant's own in the first read and gone in the second, and
    another tenant shares a "chat"."""
    record = SimpleNamespace(ref=SimpleNamespace(name="chat"), labels={})
    alias = SimpleNamespace(name="chat", alias="live")
    common = {
        "list": lambda **_: [record],
        "aliases": lambda *_: (alias,),
        "get": lambda _: record,
    }
    registry = SimpleNamespace(**common, knows=lambda _: False)
    home = SimpleNamespace(name="home", registry=registry)
    sharing = SimpleNamespace(**common, shared=lambda: ["chat"], is_shared=lambda _: True)
    other = SimpleNamespace(name="other", registry=sharing)
    tenants: Any = SimpleNamespace(
        all=[home, other], accepts=lambda _: ["other"], named={"other": other}.get
    )
    mine: Any = home
    assert Visible(tenants).page(mine) == [VisibleAdapter(mine, cast(Any, record), "chat")]
    assert Visible(tenants).aliases(mine, "") == (alias,)


class _Counted(tuple[str, ...]):
    """Names that may be counted, and are not to be looked through."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("it takes 1 ms for a thousand, on the event loop")


def test_a_name_that_is_not_there_costs_no_more_where_others_share_many() -> None:
    """FAKE registries: a tenant may share tens of thousands of names."""

    def missing(spec: str, key: str) -> Any:
        raise not_found(spec, None)

    nothing = SimpleNamespace(knows=lambda _: False, acquire=missing)
    home: Any = SimpleNamespace(name="home", registry=nothing)
    names = _Counted(f"n{number}" for number in range(20_000))
    many = SimpleNamespace(shared=lambda: names, is_shared=lambda name: name == "n7")
    other = SimpleNamespace(name="other", registry=many)
    tenants: Any = SimpleNamespace(
        all=[home, other], accepts=lambda _: [], named={"other": other}.get
    )
    for asked, metadata in (
        ("m7", {"adapter": "m7"}),
        ("n7", {"adapter": "n7", "did_you_mean": "other/n7"}),
    ):
        with pytest.raises(AdapterNotFound) as told:
            Visible(tenants).acquire(home, asked, "")
        assert told.value.metadata == metadata


# ----------------------------------------------------------------- an operator elsewhere


@pytest.mark.asyncio(loop_scope="module")
async def test_an_operator_acts_in_the_tenant_that_it_names(
    server: Shared, here: str, tmp_path: Path
) -> None:
    own = server.caller(here)
    await own.push(make_adapter(tmp_path / "1"), "chat")
    operator = server.caller("default", "operator", named=here)
    assert await operator.names() == ["chat"]
    models = (await operator.http("GET", "/v1/models")).json()["data"]
    own_models = [model["id"] for model in models if model["owned_by"] == "veneer"]
    assert own_models == ["smollm2-135m", "chat"]
    await operator.call("UpdateAdapter", name="chat", retain=3)
    entry = (await own.call("GetHistory")).entries[0]
    assert (entry.event, entry.actor) == ("retention", "default-operator")

    def noted() -> bool:  # a thread writes it
        text = (server.front.data_dir / "audit.jsonl").read_text("utf-8")
        last = json.loads(text.splitlines()[-1])
        return (last["who"], last["tenant"]) == ("default-operator", here)

    await until(noted)

    for role in ("inference", "publisher", "admin", "metrics"):
        other = server.caller("default", role, named=here)  # type: ignore[arg-type]
        told = await failure(other.call("GetServerInfo"))
        assert told.code is grpc.StatusCode.PERMISSION_DENIED
        assert (await other.http("GET", "/version")).status_code == 403
        other.named = "default"  # its own
        assert await other.call("GetServerInfo")


@pytest.mark.asyncio(loop_scope="module")
async def test_naming_a_tenant_that_does_not_exist_makes_none(
    server: Shared, here: str, tmp_path: Path
) -> None:
    operator = server.caller("default", "operator", named=here)
    told = await failure(operator.call("ListAdapters"))
    assert (told.reason, told.metadata) == ("INVALID_FIELD", {"field": "veneer-tenant"})
    http = await operator.http("GET", "/v1/models")
    assert (http.status_code, http.json()["error"]["param"]) == (400, "veneer-tenant")
    assert not (server.front.data_dir / "tenants" / here).exists()
    folder = make_adapter(tmp_path / "1")
    spec = next(iter(upload(folder, "chat"))).spec
    assert await operator.call("GetUpload", spec=spec), "a push begins with this"
    await operator.push(folder, "chat")
    assert await operator.names() == ["chat"]


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "A", "a" * 300, "a\0", "-a", "a.", "é", "default/", "a:b", " a"]
)
async def test_a_name_that_could_be_a_path_is_refused(name: str) -> None:
    with refused(PermissionDenied, cause="tenant_name"):
        await Access().admit(GET, Credentials(tenant=name))


async def test_log_lines_of_a_call_name_its_tenant() -> None:
    """What each line then says: `test_logs_and_metrics`."""
    gate = Gate(Metrics())
    for given, logged in (("team-a", "team-a"), ("default", ""), ("", "")):
        await gate.admit(CallContext(CallerValue(method=GET)), Credentials(tenant=given))
        assert logs.TENANT.get() == logged


def test_the_store_commands_say_that_other_tenants_were_left_alone(tmp_path: Path) -> None:
    for folder in ("", "tenants/team-a", "tenants/team-b"):
        Registry.open(tmp_path / folder, BASE).close()
    told: list[str] = []
    assert verify(tmp_path, told.append, quarantine=False, as_json=False)
    assert "2 others (team-a, team-b)" in told[-1]
    assert str(tmp_path / "tenants" / "team-a") in told[-1]
    told.clear()
    alone = tmp_path / "tenants" / "team-a"
    assert verify(alone, told.append, quarantine=False, as_json=False)
    assert len(told) == 1


# --------------------------------------------------------------- start, stop and trouble


@pytest.mark.push
async def test_tenants_come_back_after_a_restart_and_one_that_cannot_stops_no_other(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is broken, one that a second server owns, one killed before its first upload."""
    data = tmp_path / "front"
    folder = make_adapter(tmp_path / "a", seed=1)
    async with shared(base_folder, front_cache, data) as server:
        for tenant in ("default", "sound", "broken", "owned", "hurt"):
            await server.caller(tenant).push(folder, "chat", activate=True)
        await server.caller("sound").call("UpdateAdapter", name="chat", shared=True)
        await server.caller("default", "operator", named="sound").call(
            "UpdateAdapter", name="chat", pinned=True
        )
    tenants = data / "data" / "tenants"
    (tenants / "broken" / "catalog.sqlite").write_bytes(b"no database" * 999)
    with sqlite3.connect(tenants / "hurt" / "catalog.sqlite") as db:
        db.execute("UPDATE names SET generation = generation + 1")
    db.close()
    (tenants / "file").mkdir()
    (tenants / "file" / "store").write_text("no folder")
    (tenants / "empty").mkdir()
    (tenants / "half").mkdir()
    (tenants / "half" / "LOCK").touch()
    for odd in ("Upper", "..x", "default", "a b"):
        (tenants / odd).mkdir()
    lock = OwnerLock(tenants / "owned")
    async with shared(base_folder, front_cache, data) as server:
        expected = server.front.engine.expected
        found = {split_key(each.source.weights_digest)[0]: each.pin for each in expected}
        assert found == {"default": None, "sound": "device", "hurt": None}
        for resident in expected:
            with server.front.engine.hold(resident.source):
                pass
        for tenant in ("default", "sound"):
            assert await server.caller(tenant).names() == ["chat"]
        for tenant in ("empty", "half", "new"):
            caller = server.caller(tenant)
            assert (
                await caller.call("GetAdapter", name="sound/chat")
            ).adapter.tenant == "sound"
            await caller.push(folder, "mine")
            assert await caller.names() == ["mine"]
        told = await failure(server.caller("hurt").call("GetAdapter", name="chat"))
        assert told.code is grpc.StatusCode.DATA_LOSS, "another's of that name is not its own"
        for tenant in ("broken", "owned", "file"):
            told = await failure(server.caller(tenant).call("ListAdapters"))
            assert told.code is grpc.StatusCode.UNAVAILABLE
            assert told.metadata == {"tenant": tenant}
            assert str(tmp_path) not in told.message
            assert (await server.caller(tenant).generate()).token_ids, "the base needs none"
        lock.release()
        monkeypatch.setattr(tenants_module, "RETRY_S", 0.0)
        assert await server.caller("owned").names() == ["chat"]
        assert {p.name for p in tenants.iterdir()} >= {"Upper", "..x", "default", "a b"}


@pytest.mark.push
async def test_the_number_of_tenants_is_bounded(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """However many a token issuer names; two first calls of one tenant open it once."""
    async with shared(base_folder, front_cache, tmp_path / "f", max_tenants="4") as server:
        callers = [server.caller(f"t{n}") for n in range(3)]
        for _ in range(2):
            await asyncio.gather(*(c.names() for c in callers for _ in range(5)))
        for n in range(30):
            caller = server.caller(f"u{n}")
            told = await failure(caller.call("ListAdapters"))
            assert (told.code, told.reason) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUOTA_EXCEEDED",
            )
            assert told.metadata["limit"] == "4"
            assert (await caller.call("GetServerInfo")).adapters_registered == 0
        folders = sorted(p.name for p in (server.front.data_dir / "tenants").iterdir())
        assert folders == ["t0", "t1", "t2"]
        assert await callers[0].names() == []


@pytest.mark.push
async def test_a_tenant_whose_folder_is_deleted_harms_no_other(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    data, folder = tmp_path / "front", make_adapter(tmp_path / "a", seed=1)
    other = make_adapter(tmp_path / "b", seed=2)
    async with shared(base_folder, front_cache, data) as server:
        gone, stays = server.caller("gone"), server.caller("stays")
        for caller in (gone, stays):
            await caller.push(folder, "chat")
        shutil.rmtree(server.front.data_dir / "tenants" / "gone")
        told = await failure(
            gone.front.adapters.UploadAdapter(upload(other, "more"), metadata=gone.metadata)
        )
        assert told.code is not grpc.StatusCode.UNKNOWN
        assert str(tmp_path) not in told.message
        await stays.push(other, "more")
        assert await stays.names() == ["chat", "more"]
    async with shared(base_folder, front_cache, data) as server:
        assert await server.caller("gone").names() == []
        assert await server.caller("stays").names() == ["chat", "more"]
