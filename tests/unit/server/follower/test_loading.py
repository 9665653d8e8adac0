"""vLLM's adapter endpoints on a follower: its folder, its memory, and the registry's names."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_server.access.edit_keys import add_key
from veneer_server.access.principal import Role
from veneer_server.serving import local_folders

from tests.planted import planted
from tests.unit.server.follower.pair import Pair, bearer, pair
from tests.unit.server.rpc.front_harness import make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROLES: tuple[Role, ...] = ("inference", "publisher", "admin", "operator")


@dataclass
class Loading:
    """A registry without folders, a follower with a root, and a key of each role."""

    pair: Pair
    http: httpx.AsyncClient
    root: Path
    keys: dict[Role, str]

    async def post(self, what: str, who: Role, **fields: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        return await self.http.post(f"/v1/{what}_lora_adapter", json=fields, headers=headers)

    async def load(self, name: str, who: Role = "publisher", **more: Any) -> httpx.Response:
        path = str(self.root / name)
        return await self.post("load", who, lora_name=name, lora_path=path, **more)

    async def unload(self, name: str, who: Role = "admin") -> httpx.Response:
        return await self.post("unload", who, lora_name=name)

    async def models(self) -> list[str]:
        headers = {"authorization": f"Bearer {self.keys['inference']}"}
        listed = (await self.http.get("/v1/models", headers=headers)).json()
        return [model["id"] for model in listed["data"]]

    async def registered(self) -> dict[str, Any]:
        page = await self.pair.registry.adapters.ListAdapters(
            pb.ListAdaptersRequest(), metadata=bearer(self.keys["admin"])
        )
        return {adapter.name: adapter for adapter in page.adapters}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loading(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Loading]:
    tmp = tmp_path_factory.mktemp("loading")
    root, file, token = tmp / "roots", tmp / "keys.toml", tmp / "token"
    root.mkdir()
    keys = {
        role: add_key(file, name=role, tenant="default", roles=[role], expires=None).key
        for role in ROLES
    }
    token.write_text(keys["operator"])
    async with pair(
        base_folder,
        front_cache,
        tmp,
        registry={"keys_file": str(file)},
        keys_file=str(file),
        registry_key_file=str(token),
        lora_root=str(root),
        openai_listen="127.0.0.1:0",
    ) as both:
        url = f"http://{both.follower.addresses['openai']}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
            yield Loading(both, http, root, keys)


async def test_load_use_replace_unload(loading: Loading) -> None:
    folder = make_adapter(loading.root / "policy")
    answer = await loading.load("policy")
    assert answer.status_code == 200, answer.text
    assert "policy" in await loading.models(), "it is known here before the answer"
    assert loading.pair.follower.engine.activations, "and in memory"
    first = (await loading.registered())["policy"]
    assert first.labels == {"loaded-by": "load_lora_adapter"}
    again = await loading.load("policy")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")

    shutil.rmtree(folder)
    make_adapter(folder, seed=2)
    assert (await loading.load("policy", load_inplace=True)).status_code == 200
    assert (await loading.registered())["policy"].revision != first.revision

    gone = await loading.unload("policy")
    assert gone.status_code == 200, gone.text
    assert "policy" not in await loading.models()
    assert await loading.registered() == {}


async def test_callers_may_do_what_they_may_do_at_the_registry(loading: Loading) -> None:
    make_adapter(loading.root / "mine")
    assert (await loading.load("mine", "inference")).status_code == 403
    assert (await loading.load("mine")).status_code == 200
    refused = await loading.unload("mine", "publisher")
    assert refused.status_code == 403, "deleting takes an admin there"
    assert (await loading.unload("mine")).status_code == 200


async def test_what_the_registry_refuses(loading: Loading) -> None:
    folder = make_adapter(loading.root / "bad")
    (folder / "adapter_config.json").write_text("{}")
    refused = await loading.load("bad")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_invalid")
    assert await loading.registered() == {}


async def test_a_folder_that_cannot_be_read_to_its_end(loading: Loading) -> None:
    make_adapter(loading.root / "torn")
    right = "data = os.pread(file.descriptor, min(_PIECE, file.size - at), at)"
    with planted(local_folders, right, 'raise OSError(5, "torn")'):
        assert (await loading.load("torn")).status_code == 503
    assert (await loading.load("torn")).status_code == 200
    assert (await loading.unload("torn")).status_code == 200


async def test_without_the_registry_nothing_is_loaded(loading: Loading) -> None:
    make_adapter(loading.root / "later")
    loading.pair.proxy.refuse()
    refused = await loading.load("later")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    loading.pair.proxy.heal()
    assert await loading.registered() == {}
