"""Stored responses belong to a tenant, and outlast the server."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.server.access.tenants_kit import Caller, shared
from tests.unit.server.rpc.front_harness import running

pytestmark = pytest.mark.asyncio

ASK: dict[str, Any] = {"model": "smollm2-135m", "input": "Hi", "max_output_tokens": 2}
Call = Callable[..., Awaitable[httpx.Response]]


async def every_use(call: Call, response: str, conversation: str, item: str) -> list[str]:
    """Status and text of all that a caller can ask about what is stored, without the ids."""
    path = f"/v1/conversations/{conversation}"
    items = [{"role": "user", "content": "x"}]
    answers = [
        await call("GET", f"/v1/responses/{response}"),
        await call("GET", f"/v1/responses/{response}/input_items"),
        await call("POST", "/v1/responses", **ASK, previous_response_id=response),
        await call("POST", "/v1/responses", **ASK, conversation=conversation),
        await call(
            "POST", "/v1/responses/input_tokens", input="x", previous_response_id=response
        ),
        await call(
            "POST",
            "/v1/responses",
            **{**ASK, "input": [{"type": "item_reference", "id": item}]},
        ),
        await call("GET", path),
        await call("POST", path, metadata={"a": "b"}),
        await call("GET", f"{path}/items"),
        await call("POST", f"{path}/items", items=items),
        await call("GET", f"{path}/items/{item}"),
        await call("DELETE", f"{path}/items/{item}"),
        await call("DELETE", path),
        await call("DELETE", f"/v1/responses/{response}"),
    ]
    assert {answer.status_code for answer in answers} == {404}
    return [re.sub(r"'[a-z]+_[0-9a-f_]+'", "ID", answer.text) for answer in answers]


async def made(call: Call) -> tuple[str, str, str]:
    """Ids of a stored response, of a conversation, and of an item of both."""
    talk = (await call("POST", "/v1/conversations", items=[])).json()["id"]
    response = (await call("POST", "/v1/responses", **ASK, conversation=talk)).json()
    return response["id"], talk, response["output"][0]["id"]


@pytest.mark.push
async def test_another_tenant_cannot_tell_that_they_exist(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    data = tmp_path / "front"
    async with shared(base_folder, front_cache, data) as server:
        owner = server.caller("a", "inference")
        stored = await made(owner.http)
        for stranger in (
            server.caller("b", "inference"),
            server.caller("b", "operator"),
            server.caller("default", "operator"),
        ):
            theirs = await every_use(stranger.http, *stored)
            absent = await every_use(stranger.http, "resp_0", "conv_0", "msg_0_0")
            assert theirs == absent
        colleague = server.caller("a", "admin")
        visitor = server.caller("c", "operator", named="a")
        for caller in (owner, colleague, visitor):
            await sees(caller, *stored)
        keys = server.keys
    # After a restart, with the keys of before.
    async with running(
        base_folder,
        front_cache,
        data,
        openai_listen="127.0.0.1:0",
        keys_file=str(keys),
        store_responses="on",
    ) as front:
        again = Caller(front, owner.tenant, owner.key)
        await sees(again, *stored)
        assert (await again.http("DELETE", f"/v1/responses/{stored[0]}")).status_code == 200


async def sees(caller: Caller, response: str, conversation: str, item: str) -> None:
    """The items are those of one turn: nobody else has added any."""
    found = (await caller.http("GET", f"/v1/responses/{response}")).json()
    assert [each["id"] for each in found["output"]] == [item]
    items = await caller.http("GET", f"/v1/conversations/{conversation}/items")
    assert [each["role"] for each in items.json()["data"]] == ["assistant", "user"]


async def test_a_server_that_stores_nothing_says_so(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        openai_listen="127.0.0.1:0",
        store_responses="off",
    ) as front:
        url = f"http://{front.addresses['openai']}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            for more in ({}, {"store": True}, {"store": False}):
                answer = await http.post("/v1/responses", json={**ASK, **more})
                assert (answer.status_code, answer.json()["store"]) == (200, False)
            for field in ("previous_response_id", "conversation"):
                answer = await http.post("/v1/responses", json={**ASK, field: "resp_1"})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, field)
                assert "--store-responses" in error["message"]
            for path in ("/v1/responses/resp_1", "/v1/conversations/conv_1"):
                answer = await http.get(path)
                assert answer.status_code == 400
            answer = await http.post("/v1/conversations", json={})
            assert answer.status_code == 400
        assert not list(front.data_dir.glob("responses.sqlite*"))
