"""Every method of every port as every kind of caller, by the table of docs/security.md."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from veneer_client.failures import write_broke
from veneer_proto.v1 import (
    adapters_pb2,
    inference_pb2,
    replication_pb2,
    replication_pb2_grpc,
    server_pb2,
)
from veneer_server.access.edit_keys import add_key
from veneer_server.access.methods import METHODS, SCRAPE
from veneer_server.access.principal import ROLES

from tests.places import REPOSITORY
from tests.planted import planted
from tests.unit.server.rpc.front_harness import Front, make_adapter, prompt, running, upload

PAGE: Final = REPOSITORY / "docs" / "security.md"
ONE: Final = inference_pb2.StoppingOptions(max_tokens=1)

REQUESTS: Final[Mapping[str, Any]] = {
    "InferenceService/Generate": prompt(stopping=ONE),
    "InferenceService/GenerateStream": prompt(stopping=ONE),
    "AdapterService/GetUpload": adapters_pb2.GetUploadRequest(),
    "AdapterService/RegisterAdapter": adapters_pb2.RegisterAdapterRequest(),
    "AdapterService/DownloadAdapter": adapters_pb2.DownloadAdapterRequest(name="none"),
    "AdapterService/GetAdapter": adapters_pb2.GetAdapterRequest(),
    "AdapterService/ListAdapters": adapters_pb2.ListAdaptersRequest(),
    "AdapterService/ActivateAdapter": adapters_pb2.ActivateAdapterRequest(name="none"),
    "AdapterService/ActivateAdapter with pin": adapters_pb2.ActivateAdapterRequest(
        name="none", pin=True
    ),
    "AdapterService/EvictAdapter": adapters_pb2.EvictAdapterRequest(name="none"),
    "AdapterService/EvictAdapter with unpin": adapters_pb2.EvictAdapterRequest(
        name="none", unpin=True
    ),
    "AdapterService/DeleteAdapter": adapters_pb2.DeleteAdapterRequest(name="none"),
    "AdapterService/SetAlias": adapters_pb2.SetAliasRequest(alias="none"),
    "AdapterService/ListAliases": adapters_pb2.ListAliasesRequest(),
    "AdapterService/WatchAdapters": adapters_pb2.WatchAdaptersRequest(),
    "AdapterService/UpdateAdapter": adapters_pb2.UpdateAdapterRequest(name="none", retain=3),
    "AdapterService/UpdateAdapter with pinned": adapters_pb2.UpdateAdapterRequest(
        name="none", pinned=True
    ),
    "AdapterService/GetHistory": adapters_pb2.GetHistoryRequest(),
    "AdapterService/UpdateBudgets": adapters_pb2.UpdateBudgetsRequest(),
    "AdapterService/SelfTest": adapters_pb2.SelfTestRequest(),
    "ServerService/GetServerInfo": server_pb2.GetServerInfoRequest(),
    "ServerService/PlanCapacity": server_pb2.PlanCapacityRequest(),
    "ServerService/GetUsage": server_pb2.GetUsageRequest(),
    "ServerService/GetUsage of another tenant": server_pb2.GetUsageRequest(tenant="b"),
    "ReplicationService/FetchWeights": replication_pb2.FetchWeightsRequest(),
    "Health/Check": health_pb2.HealthCheckRequest(),
    "Health/Watch": health_pb2.HealthCheckRequest(),
    "Health/List": health_pb2.HealthListRequest(),
}
THEIRS: Final = "theirs"
"""An adapter of the tenant ``default``, which a caller of another tenant asks for."""
OTHER: Final = "another tenant"
STREAMS: Final = ("WatchAdapters", "Watch", "GenerateStream", "DownloadAdapter", "FetchWeights")
REFUSED: Final = {
    grpc.StatusCode.UNAUTHENTICATED: "401",
    grpc.StatusCode.PERMISSION_DENIED: "403",
}


KEYLESS: Final = ("no key", "wrong or expired key")
ALLOWED: Final[Mapping[str, frozenset[str]]] = {
    "anybody": frozenset({*KEYLESS, *ROLES}),
    "any key": frozenset(ROLES),
    "inference": frozenset({"inference", "admin", "operator"}),
    "inference or publisher": frozenset({"inference", "publisher", "admin", "operator"}),
    "publisher": frozenset({"publisher", "admin", "operator"}),
    "admin": frozenset({"admin", "operator"}),
    "operator": frozenset({"operator"}),
    "metrics": frozenset({"metrics", "operator"}),
}
"""Who may call, as the page has it -> the callers to whom it applies."""


def table() -> dict[str, dict[str, str]]:
    """Method -> caller -> "yes", "401", "403", "404" or "own"."""
    lines = PAGE.read_text("utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| who may call |"))
    found: dict[str, dict[str, str]] = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[at + 2 :]):
        who, methods, other = (cell.strip() for cell in line.strip("| ").split("|"))
        allowed = ALLOWED[who.replace("`", "")]
        told = {
            caller: "yes" if caller in allowed else "401" if caller in KEYLESS else "403"
            for caller in (*KEYLESS, *ROLES)
        }
        for method in re.split(", (?=`)", methods):
            name = method.replace("`", "")
            assert name not in found, f"{name} has one row"
            found[name] = {**told, OTHER: other}
    return found


@dataclass
class Guarded:
    """A front that asks for keys, and a key of each kind of caller."""

    front: Front
    keys: dict[str, list[str]]
    """Caller of the table -> its keys; "" for none."""
    stranger: str
    """The key of an operator of another tenant."""
    folder: Path
    """The files of `THEIRS`."""
    etag: str

    async def told(self, method: str, key: str, adapter: str = "") -> str:
        """What a caller is told: "yes", "401", "403", or "404" if it asks for an adapter."""
        if method.startswith(("GET ", "POST ", "DELETE ")):
            return await self._http(method, key, adapter)
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        for _ in range(5):
            try:
                await self._grpc(method, metadata, adapter)
            except grpc.aio.AioRpcError as error:
                if write_broke(error):
                    continue  # the call was over before its first message was sent
                if adapter and error.code() is grpc.StatusCode.NOT_FOUND:
                    return "404"
                return REFUSED.get(error.code(), "yes")
            return "yes"
        raise AssertionError(f"{method} ended five times before its message was sent")

    async def told_a_stranger(self, method: str) -> str:
        """What another tenant's operator is told who asks for `THEIRS`: "404", "yes", or "own"
        if the adapter is in no answer although its own tenant's sees it."""
        told = await self.told(method, self.stranger, THEIRS)
        if told != "yes" or await self._shows(method, self.stranger):
            return told
        return "own" if await self._shows(method, self.keys["operator"][0]) else told

    async def _shows(self, method: str, key: str) -> bool:
        """Whether an answer says that there is `THEIRS`."""
        metadata = (("authorization", f"Bearer {key}"),)
        adapters = self.front.adapters
        match method:
            case "AdapterService/UploadAdapter":
                _, *rest = upload(self.folder, THEIRS, validate_only=True)
                options = {"validate_only": True, "etag": self.etag}
                spec = next(iter(upload(self.folder, THEIRS, **options)))
                try:
                    await adapters.UploadAdapter(iter([spec, *rest]), metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    return error.code() is not grpc.StatusCode.FAILED_PRECONDITION
                return True
            case "AdapterService/GetUpload":
                spec = next(iter(upload(self.folder, "new"))).spec
                request = adapters_pb2.GetUploadRequest(spec=spec)
                answer = await adapters.GetUpload(request, metadata=metadata)
                return any(answer.committed.values())
            case "AdapterService/WatchAdapters":
                watch = adapters.WatchAdapters(REQUESTS[method], metadata=metadata)
                while True:
                    event = await watch.read()
                    if event.event == adapters_pb2.ADAPTER_EVENT_SYNCED or event.HasField(
                        "adapter"
                    ):
                        watch.cancel()
                        return bool(event.adapter.name == THEIRS)
            case "AdapterService/ListAdapters" | "AdapterService/GetHistory":
                call: Any = getattr(adapters, method.partition("/")[2])
                return THEIRS in str(await call(REQUESTS[method], metadata=metadata))
            case "ServerService/GetServerInfo":
                info = await self.front.server.GetServerInfo(
                    REQUESTS[method], metadata=metadata
                )
                return bool(info.adapters_registered)
            case "POST /v1/load_lora_adapter":
                async with httpx.AsyncClient(trust_env=False) as http:
                    url = f"http://{self.front.addresses['openai']}/v1/load_lora_adapter"
                    given = body("/v1/load_lora_adapter", THEIRS)
                    answer = await http.post(url, json=given, headers=dict(metadata))
                    return bool(answer.json()["error"]["param"] == "lora_name")
            case "GET /v1/models" | "GET /api/tags" | "GET /api/ps":
                if method == "GET /api/ps":
                    own = (("authorization", f"Bearer {self.keys['operator'][0]}"),)
                    activated = adapters_pb2.ActivateAdapterRequest(name=THEIRS)
                    await adapters.ActivateAdapter(activated, metadata=own)
                async with httpx.AsyncClient(trust_env=False) as http:
                    url = f"http://{self.front.addresses['openai']}{method.split()[1]}"
                    return THEIRS in (await http.get(url, headers=dict(metadata))).text
        return False

    async def _http(self, method: str, key: str, adapter: str) -> str:
        verb, path = method.split()[:2]
        port = "metrics" if method.endswith("on the metrics port") else "openai"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            answer = await http.request(
                verb,
                f"http://{self.front.addresses[port]}{path}",
                headers=headers,
                json=body(path, adapter) if verb == "POST" else None,
            )
        refused = (401, 403, 404) if adapter else (401, 403)
        return str(answer.status_code) if answer.status_code in refused else "yes"

    async def _grpc(self, method: str, metadata: Any, adapter: str) -> None:
        front = self.front
        stubs = {
            "InferenceService": front.inference,
            "AdapterService": front.adapters,
            "ServerService": front.server,
            "ReplicationService": replication_pb2_grpc.ReplicationServiceStub(front.channel),
            "Health": health_pb2_grpc.HealthStub(front.channel),
            "ServerReflection": reflection_pb2_grpc.ServerReflectionStub(front.channel),
        }
        service, _, name = method.partition("/")
        call: Any = getattr(stubs[service], name.split()[0])
        if name == "UploadAdapter":
            await call(iter([adapters_pb2.UploadAdapterRequest()]), metadata=metadata)
        elif name.startswith("ServerReflectionInfo"):
            wanted = reflection_pb2.ServerReflectionRequest(list_services="*")
            if not name.endswith("v1alpha"):
                call = v1_reflection(front)
            await first(call(iter([wanted]), metadata=metadata))
        elif name == "Follow":
            await first(call(iter([replication_pb2.FollowRequest()]), metadata=metadata))
        elif name.split()[0] in STREAMS:
            await first(call(asking(method, adapter), metadata=metadata))
        else:
            await call(asking(method, adapter), metadata=metadata)


def v1_reflection(front: Front) -> Any:
    """The call, whose messages are v1alpha's."""
    return front.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )


def body(path: str, adapter: str) -> dict[str, Any]:
    """The body of a POST, about an adapter if any is given. None of them changes anything."""
    model = {"model": adapter or "smollm2-135m"}
    return {
        "/v1/chat/completions": {
            **model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        },
        "/v1/completions": {**model, "prompt": "Hi", "max_tokens": 1},
        "/v1/responses": {**model, "input": "Hi", "max_output_tokens": 1},
        "/v1/responses/input_tokens": {**model, "input": "Hi"},
        "/v1/conversations/{id}": {"metadata": {}},
        "/v1/conversations/{id}/items": {"items": [{"role": "user", "content": "Hi"}]},
        "/v1/messages": {
            **model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        },
        "/v1/messages/count_tokens": {
            **model,
            "messages": [{"role": "user", "content": "Hi"}],
        },
        "/inference/v1/generate": {
            **model,
            "token_ids": [1000],
            "sampling_params": {"max_tokens": 1},
        },
        "/api/chat": {
            **model,
            "messages": [{"role": "user", "content": "Hi"}],
            "options": {"num_predict": 1},
        },
        "/api/generate": {**model, "prompt": "Hi", "options": {"num_predict": 1}},
        "/api/show": model,
        "/tokenize": {**model, "prompt": "Hi"},
        "/detokenize": {**model, "tokens": [1000]},
        "/v1/load_lora_adapter": {"lora_name": adapter or "none", "lora_path": "none"},
        "/v1/unload_lora_adapter": {"lora_name": adapter or "none"},
    }.get(path, {})


def asking(method: str, adapter: str) -> Any:
    """The request of a method, about an adapter if it names one and any is given."""
    request = type(REQUESTS[method])()
    request.CopyFrom(REQUESTS[method])
    fields = {each.name for each in request.DESCRIPTOR.fields}
    if not adapter or method.startswith(("Health", "AdapterService/GetHistory")):
        return request
    if "adapters" in fields and method == "AdapterService/SelfTest":
        request.adapters.append(adapter)
    elif "alias" in fields:
        request.alias, request.revision = f"{adapter}/prod", "0" * 12
    else:
        for name in ("name", "adapter", "like"):
            if name in fields and method != "AdapterService/RegisterAdapter":
                setattr(request, name, adapter)
                break
    return request


async def first(stream: Any) -> None:
    """The stream's first message, and no more of it; raises its error if it has none."""
    try:
        if await stream.read() is grpc.aio.EOF:
            await stream
    finally:
        stream.cancel()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Guarded]:
    data = tmp_path_factory.mktemp("guarded")
    file = data / "keys.toml"
    keys: dict[str, list[str]] = {"no key": [""]}
    for role in ROLES:
        made = add_key(file, name=role, tenant="default", roles=[role], expires=None)
        keys[role] = [made.key]
    old = add_key(
        file,
        name="old",
        tenant="default",
        roles=["operator"],
        expires=datetime.now(UTC) - timedelta(seconds=1),
    )
    stranger = add_key(file, name="far", tenant="far", roles=["operator"], expires=None).key
    right = keys["operator"][0]
    wrong = right[:-1] + ("A" if right[-1] != "A" else "B")
    keys["wrong or expired key"] = [old.key, wrong, "nonsense", "vn__", right + " " + right]
    async with running(
        base_folder,
        front_cache,
        data,
        openai_listen="127.0.0.1:0",
        keys_file=str(file),
        refusal_rate="0",
    ) as front:
        folder = make_adapter(data / "adapter")
        metadata = (("authorization", f"Bearer {right}"),)
        pushed = await front.adapters.UploadAdapter(upload(folder, THEIRS), metadata=metadata)
        yield Guarded(front, keys, stranger, folder, pushed.adapter.etag)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", sorted(table()))
async def test_a_method_answers_those_that_the_page_says(guarded: Guarded, method: str) -> None:
    expected = table()[method]
    assert await guarded.told_a_stranger(method) == expected.pop(OTHER)
    assert expected.keys() == guarded.keys.keys()
    found = {
        caller: {await guarded.told(method, key) for key in keys}
        for caller, keys in guarded.keys.items()
    }
    assert found == {caller: {told} for caller, told in expected.items()}


@pytest.mark.asyncio(loop_scope="module")
async def test_the_page_lists_every_method_that_a_port_has(guarded: Guarded) -> None:
    listed = {re.sub(r" (with|on|of) .*", "", method) for method in table()}
    pool = descriptor_pool.Default()
    wanted = reflection_pb2.ServerReflectionRequest(list_services="*")
    metadata = (("authorization", f"Bearer {guarded.keys['operator'][0]}"),)
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(guarded.front.channel)
    call = stub.ServerReflectionInfo(iter([wanted]), metadata=metadata)
    answer = await call.read()
    call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert "veneer.v1.AdapterService" in names
    for name in names:
        for method in pool.FindServiceByName(name).methods:
            assert f"{name.rpartition('.')[2]}/{method.name}" in listed
    http = {name for name in METHODS if not name.startswith("/")}
    assert http == {name for name in listed if " " in name} | {SCRAPE}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("module", "right", "wrong", "method", "caller"),
    [
        (
            "veneer_server.access.methods",
            "return METHODS.get(method)",
            'return OPEN if method.endswith("DeleteAdapter") else METHODS.get(method)',
            "AdapterService/DeleteAdapter",
            "no key",
        ),
        (
            "veneer_server.access.authenticate",
            "if not principal.has(roles):",
            "if not principal.roles:",
            "AdapterService/UpdateBudgets",
            "inference",
        ),
        (
            "veneer_server.access.keys",
            "if found is None or not same or found.expired(now):",
            "if found is None or found.expired(now):",
            "InferenceService/Generate",
            "wrong or expired key",
        ),
        (
            "veneer_server.access.keys",
            "if found is None or not same or found.expired(now):",
            "if found is None or not same:",
            "GET /v1/models",
            "wrong or expired key",
        ),
        (
            "veneer_server.serving.tenants",
            "        found = self._by_name.get(principal.tenant)",
            "        found = self._by_name.get(DEFAULT_TENANT)",
            "AdapterService/ListAdapters",
            OTHER,
        ),
        (
            "veneer_server.serving.visible",
            "        owner = self._accepted(home, first)",
            "        owner = next((t for t in self._tenants.all if first in t.registry), None)",
            "POST /v1/completions",
            OTHER,
        ),
    ],
    ids=[
        "a method is left open",
        "roles are not checked",
        "secrets",
        "expiry",
        "one tenant for all",
        "what is not shared",
    ],
)
async def test_a_planted_hole_is_seen(
    guarded: Guarded, module: str, right: str, wrong: str, method: str, caller: str
) -> None:
    import importlib

    with planted(importlib.import_module(module), right, wrong):
        if caller == OTHER:
            told = {await guarded.told_a_stranger(method)}
        else:
            told = {await guarded.told(method, key) for key in guarded.keys[caller]}
    assert told != {table()[method][caller]}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_method_that_is_not_listed_is_refused(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that somebody adds and forgets."""
    left = {k: v for k, v in METHODS.items() if not k.endswith("/GetServerInfo")}
    monkeypatch.setattr("veneer_server.access.methods.METHODS", left)
    for key in guarded.keys["operator"]:
        assert await guarded.told("ServerService/GetServerInfo", key) == "403"
