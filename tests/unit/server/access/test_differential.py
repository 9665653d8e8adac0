"""The same calls of one tenant, with and without another's adapters and traffic, get the same
answers, errors, counts and lists.

The engine is FAKE; `tests/integration/test_tenants.py` does the same with a real one. Times,
ids and ports are left out of the comparison, and what the server as a whole uses (peaks of
memory).
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import status_pb2
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_server.access.methods import METHODS

from tests.planted import planted
from tests.unit.server.access.tenants_kit import SERVICES, Caller, Shared, shared
from tests.unit.server.rpc.front_harness import make_adapter, prompt, upload

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEFT_OUT: Final = frozenset(
    {
        "created",
        "createTime",
        "updated",
        "time",
        "uptime",
        "lastUsed",
        "requestId",
        "timings",
        "frontPeakBytes",
        "enginePeakBytes",
        "peer",
        "actor",
        "id",
        "date",
        "x-request-id",
        "created_at",
        "request_id",  # of HTTP
        "modified_at",
        "total_duration",
        "load_duration",
        "prompt_eval_duration",
        "eval_duration",
        "server_load",  # of all tenants, as QUEUE_FULL tells it too
        "start",
        "end",
        "adapterByteHours",  # of GetUsage
    }
)
ENDS: Final = "marker"
"""The adapter whose publication is the last event of a script."""


@dataclass
class Script:
    """Calls of one tenant, and what they were answered."""

    caller: Caller
    folders: list[Path]
    noise: Callable[[], Awaitable[None]]
    answers: list[tuple[str, Any]] = field(default_factory=list)

    async def do(self, name: str, /, **fields: Any) -> None:
        """An rpc with one answer, or a stream of them."""
        self.note(name, await _told(self.caller.call(name, **fields)))
        await self.noise()

    async def push(self, folder: int, name: str, /, **options: Any) -> None:
        call = self.caller.push(self.folders[folder], name, **options)
        self.note("UploadAdapter", await _told(call))
        await self.noise()

    async def http(self, verb: str, path: str, **body: Any) -> None:
        answer = await self.caller.http(verb, path, **body)
        told: Any = answer.text
        if answer.headers["content-type"] == "application/json":
            told = _plain(answer.json())
        if path == "/metrics":  # of all tenants, for an operator
            self.note(f"{verb} {path}", answer.status_code)
            return
        headers = dict(answer.headers)
        if path.startswith("/api/"):  # these answers say how long they took
            headers.pop("content-length", None)
        self.note(f"{verb} {path}", (answer.status_code, _plain(headers), told))
        await self.noise()

    def note(self, what: str, told: Any) -> None:
        # Etags and the names of keys and tenants are the same for every tenant.
        self.answers.append((what, told))

    async def run(self) -> list[tuple[str, Any]]:
        watch = self.caller.call("WatchAdapters")
        events = asyncio.ensure_future(_events(watch))
        await self.publish()
        await self.look()
        await self.change()
        await self.generate()
        await self.of_http()
        await self.serve()
        await self.end()
        await self.push(0, ENDS)
        self.note("WatchAdapters", await events)
        watch.cancel()
        return self.answers

    async def publish(self) -> None:
        for options in ({"validate_only": True}, {}, {"labels": {"team": "x"}}):
            await self.push(0, "chat", **options)
        await self.push(1, "chat")  # holds other content
        await self.push(1, "chat", allow_replace=True)
        await self.push(2, "twin", activate=True)
        await self.push(3, "cold")
        for folder in (0, 7, 8):  # own content, and what only the other has
            (spec,) = list(upload(self.folders[folder], "later"))[:1]
            await self.do("GetUpload", spec=spec.spec)
        for uri in ("file:x", "file:///etc", "hf://org/x"):
            await self.do("RegisterAdapter", name="x", uri=uri)

    async def look(self) -> None:
        for fields in (
            {},
            {"page_size": 1},
            {"name_prefix": "s"},
            {"tier": 4},
            {"tier": 2},
            {"labels": {"team": "theirs"}},
        ):
            await self.do("ListAdapters", **fields)
        for name in ("chat", "twin", "secret", "secre", "chap", "s", "", "secret@" + "0" * 12):
            await self.do("GetAdapter", name=name)
            await self.do("DownloadAdapter", name=name)
        for name in ("", "chat", "secret"):
            await self.do("ListAliases", name=name)
            await self.do("GetHistory", name=name)
        for like in ("chat", "secret"):
            await self.do("PlanCapacity", like=like)
        await self.do("PlanCapacity", adapters=3)
        await self.do("GetServerInfo")

    async def change(self) -> None:
        revisions = (await self.caller.call("GetAdapter", name="chat")).revisions
        for name in ("chat", "secret"):
            for revision in (revisions[0].revision, revisions[-1].revision):
                await self.do("SetAlias", alias=f"{name}/prod", revision=revision)
            await self.do("SetAlias", alias=f"{name}/prod", rollback=True)
            await self.do("UpdateAdapter", name=name, retain=5, labels={"a": "b"})
            await self.do("UpdateAdapter", name=name, pinned=True)
            await self.do("EvictAdapter", name=name)
            await self.do("ActivateAdapter", name=name, tier=3, pin=True)
            await self.do("UpdateAdapter", name=name, pinned=False)
            await self.do("EvictAdapter", name=name, unpin=True)
            await self.do("GetAdapter", name=name)
        await self.do("EvictAdapter", name="twin", mode=2)
        await self.do("GetAdapter", name="twin")
        await self.do("ActivateAdapter", name="twin")
        await self.do("UpdateBudgets")

    async def generate(self) -> None:
        for name in ("", "chat", "chat/prod", "twin", "cold", "secret", "secret/prod", "chet"):
            sampling = inference_pb2.SamplingOptions(seed=7)
            request = prompt(adapter=name, sampling=sampling)
            fields = {each.name: value for each, value in request.ListFields()}
            await self.do("Generate", **fields)
            await self.do("GenerateStream", **fields)

    async def of_http(self) -> None:
        await self.http("GET", "/v1/models")
        for name in ("chat", "secret", "smollm2-135m", "secre"):
            await self.http("GET", f"/v1/models/{name}")
            body = {"model": name, "max_tokens": 2, "seed": 1, "temperature": 0}
            messages = [{"role": "user", "content": "Hi"}]
            await self.http("POST", "/v1/completions", **body, prompt="Hi")
            await self.http("POST", "/v1/chat/completions", **body, messages=messages)
            await self.http("POST", "/v1/responses", model=name, input="Hi", seed=1)
            await self.http("POST", "/v1/messages", **body, messages=messages)
            await self.http("POST", "/v1/messages/count_tokens", model=name, messages=messages)
            sampling = {"max_tokens": 2, "seed": 1, "temperature": 0}
            await self.http(
                "POST",
                "/inference/v1/generate",
                model=name,
                token_ids=[1000],
                sampling_params=sampling,
            )
            options = {"num_predict": 2, "seed": 1, "temperature": 0}
            asked = {"model": name, "options": options, "stream": False}
            await self.http("POST", "/api/chat", **asked, messages=messages)
            await self.http("POST", "/api/generate", **asked, prompt="Hi")
            await self.http("POST", "/api/show", model=name)
            await self.http("POST", "/tokenize", model=name, messages=messages)
            await self.http("POST", "/detokenize", model=name, tokens=[1000])
            loading = {"lora_name": name, "lora_path": "/none"}
            await self.http("POST", "/v1/load_lora_adapter", **loading)
        await self.http("POST", "/v1/responses/input_tokens", model="chat", input="Hi")
        items = [{"role": "user", "content": "Hi"}]
        await self.http("POST", "/v1/conversations", items=items)
        await self.http("POST", "/v1/conversations/{id}", metadata={"a": "b"})
        await self.http("POST", "/v1/conversations/{id}/items", items=items)
        for path in (
            "/v1/responses/{id}",
            "/v1/responses/{id}/input_items",
            "/v1/conversations/{id}",
            "/v1/conversations/{id}/items",
            "/v1/conversations/{id}/items/{item}",
        ):
            await self.http("GET", path)
            if not path.endswith("items"):
                await self.http("DELETE", path)
        await self.http("POST", "/v1/unload_lora_adapter", lora_name="secret")
        await self.http("POST", "/pause")
        await self.http("POST", "/resume")
        await self.http("POST", "/reset_prefix_cache")
        for path in (
            "/version",
            "/health",
            "/livez",
            "/ping",
            "/load",
            "/is_paused",
            "/server_info",
            "/get_world_size",
            "/tokenizer_info",
            "/",
            "/api/tags",
            "/api/ps",
            "/api/version",
        ):
            await self.http("GET", path)
        await self.http("GET", "/metrics")
        await self.http("POST", "/ping")

    async def serve(self) -> None:
        await self.do("SelfTest")
        for name in ("chat", "secret"):
            await self.do("SelfTest", adapters=[name])
        await self.do("GetServerInfo")
        # An operator that names no tenant is told of all.
        await self.do("GetUsage", tenant=self.caller.tenant)

    async def end(self) -> None:
        for name in ("cold", "secret", "chat", "twin"):
            await self.do("DeleteAdapter", name=name)
        await self.do("ListAdapters")
        await self.do("GetHistory")
        await self.do("GetServerInfo")


async def _told(call: Any) -> Any:
    try:
        if hasattr(call, "__aiter__"):
            return [_plain(message) async for message in call]
        return _plain(await call)
    except grpc.aio.AioRpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        status = status_pb2.Status.FromString(trailing.pop("grpc-status-details-bin"))
        return error.code().name, status.message, _details(status), _plain(trailing)


def _details(status: status_pb2.Status) -> Any:
    found = MessageToDict(status)["details"]
    return [detail for detail in found if "RequestInfo" not in detail["@type"]]


async def _events(watch: Any) -> list[Any]:
    """Registry and engine events, up to the last publication. What an adapter was like when it
    was sent depends on when that was."""
    found = []
    async for message in watch:
        adapter = message.adapter
        event = adapters_pb2.AdapterEvent.Name(message.event)
        found.append((event, adapter.name, adapter.revision, message.detail))
        if adapter.name == ENDS:
            break
    return found


def _plain(value: Any) -> Any:
    """A message or JSON without what differs between any two runs."""
    if isinstance(value, Message):
        value = MessageToDict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in LEFT_OUT}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, str):
        return value
    # Each run has a port and a tenant of its own.
    return re.sub(r"\btenant-\d+\b", "TENANT", re.sub(r"127\.0\.0\.1:\d+", "HOST", value))


@dataclass
class World:
    server: Shared
    folders: list[Path]
    alone: list[tuple[str, Any]] = field(default_factory=list)
    runs: int = 0

    async def run(self, noise: Callable[[], Awaitable[None]]) -> list[tuple[str, Any]]:
        self.runs += 1
        caller = self.server.caller(f"tenant-{self.runs}", "operator")
        return await Script(caller, self.folders, noise).run()


class Other:
    """The other tenant: the same names with other weights, names that only it has, and traffic
    between any two calls of the first."""

    def __init__(self, caller: Caller, folders: list[Path]) -> None:
        self._caller = caller
        self._folders = folders
        self._turn = 0

    async def begin(self) -> None:
        caller, folders = self._caller, self._folders
        for name, folder in (("chat", 5), ("cold", 6), ("secret", 7), ("secrets", 8)):
            await caller.push(folders[folder], name, labels={"team": "theirs"})
        await caller.push(folders[2], "twin", activate=True)  # the same weights as theirs
        await caller.push(folders[1], "spare", activate=True)
        await caller.call("UpdateAdapter", name="twin", pinned=True)
        revision = (await caller.call("GetAdapter", name="secret")).adapter.revision
        for name in ("secret/prod", "secret/canary"):
            await caller.call("SetAlias", alias=name, revision=revision)

    async def __call__(self) -> None:
        caller = self._caller
        self._turn += 1
        match self._turn % 6:
            case 0:
                await caller.push(self._folders[5], "chat", allow_replace=True)
            case 1:
                await caller.push(self._folders[6], "chat", allow_replace=True)
            case 2:
                await caller.call("EvictAdapter", name="spare")
            case 3:
                await caller.call("ActivateAdapter", name="spare", tier=3)
            case _:
                await caller.generate(adapter="twin")


async def silence() -> None:
    pass


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """A server on which one tenant has run the script alone, and another tenant has begun."""
    data = tmp_path_factory.mktemp("differential")
    folders = [make_adapter(data / f"a{n}", seed=n) for n in range(9)]
    async with shared(base_folder, front_cache, data / "front") as server:
        made = World(server, folders)
        made.alone = await made.run(silence)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(world: World) -> Other:
    made = Other(world.server.caller("other", "operator"), world.folders)
    await made.begin()
    return made


@pytest.mark.push
async def test_the_script_calls_every_method(world: World) -> None:
    called = {what for what, _ in world.alone}
    for service, (module, _) in SERVICES.items():
        for method in module.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods:
            assert method.name in called, f"{method.name} is not in the script"
    paths = {what.replace("/v1/models/chat", "/v1/models") for what in called if " " in what}
    assert {name for name in METHODS if " /" in name} <= paths


@pytest.mark.push
async def test_another_tenant_changes_nothing(world: World, other: Other) -> None:
    beside = await world.run(other)
    assert len(beside) == len(world.alone) > 100
    for (what, expected), (_, found) in zip(world.alone, beside, strict=True):
        assert found == expected, what


@pytest.mark.verify
@pytest.mark.parametrize(
    ("module", "right", "wrong"),
    [
        (
            "serving.visible",
            "        found = [VisibleAdapter(home, record, record.ref.name) for record in own]",
            "        found = [VisibleAdapter(home, record, record.ref.name) "
            "for t in self._tenants.all "
            "for record in t.registry.list(after=after, limit=limit)]",
        ),
        (
            "serving.visible",
            "        owner = self._accepted(home, first)",
            "        owner = next((t for t in self._tenants.all if first in t.registry), None)",
        ),
        (
            "engine_client.tenant_engine",
            "        return self._engine.tier(copy_key(self._tenant, weights_digest))",
            "        own = self._engine.tier(copy_key(self._tenant, weights_digest))\n"
            '        return own or self._engine.tier(copy_key("other", weights_digest))',
        ),
        (
            "serving.tenants",
            "        tenant.events.on_engine_event(event)",
            "        [each.events.on_engine_event(event) for each in self.all]",
        ),
    ],
    ids=["lists", "names", "tiers", "events"],
)
async def test_a_planted_hole_is_seen(
    world: World, other: Other, module: str, right: str, wrong: str
) -> None:
    with planted(importlib.import_module(f"veneer_server.{module}"), right, wrong):
        beside = await world.run(other)
    assert beside != world.alone
