"""Errors, ends of streams and metrics of the gateway over real sockets with a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import httpx
import pytest
from veneer_registry.errors import NonFiniteOutput, QueueFull
from veneer_registry.registry import Registry
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.garbage import collected
from tests.unit.server.openai.kit import CHAT, TEXT, error_of, ok, post
from tests.unit.server.rpc.front_harness import Front, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "kind", "status", "code", "says"),
    [
        (b"{", "application/json", 400, "invalid_json", "not valid JSON"),
        (b'{"a": NaN}', "application/json", 400, "invalid_json", "NaN"),
        (b'{"a": "\\ud800"}', "application/json", 400, "invalid_json", "surrogate"),
        (b"[" * 100_000, "application/json", 400, "invalid_json", "not valid JSON"),
        (b"\xff", "application/json", 400, "invalid_json", "not valid JSON"),
        (b"[]", "application/json", 400, "invalid_field", "JSON object"),
        (b"{}", "application/json; charset=utf-8", 400, "invalid_field", "is missing"),
        (b"{}", "text/plain", 400, "invalid_field", "is missing"),
        (b"{}", "", 400, "invalid_field", "is missing"),
        (b"a=1", "application/x-www-form-urlencoded", 400, "invalid_json", "not valid JSON"),
        (b" " * ((4 << 20) + 1), "application/json", 413, "request_too_large", "send less"),
    ],
)
async def test_bodies_that_are_no_request(
    http: httpx.AsyncClient, content: bytes, kind: str, status: int, code: str, says: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = await http.post("/v1/completions", content=content, headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code)
    assert says in error["message"]
    assert (await ok(http, TEXT))["choices"], "the server goes on"


@pytest.mark.parametrize("path", ["/v1", "/v1/nothing", "/v1/chat/completions/"])
async def test_unknown_paths_name_the_known_ones(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.post(path, json={})
    assert answer.status_code == 404
    assert "/v1/chat/completions" in error_of(answer)["message"]


async def test_a_wrong_method_names_the_right_one(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "use POST" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "usr", "content": "x"}]}),
        ("/v1/responses", {"input": [{"role": "usr", "content": "x"}]}),
        ("/v1/messages", {"messages": [{"role": "usr", "content": "x"}], "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "usr", "content": "x"}]}),
        ("/api/chat", {"messages": [{"role": "usr", "content": "x"}]}),
        ("/tokenize", {"messages": [{"role": "usr", "content": "x"}]}),
    ],
)
async def test_a_misspelt_role_is_refused_with_the_roles(
    path: str, body: dict[str, Any], http: httpx.AsyncClient
) -> None:
    answer = await http.post(path, json={"model": CHAT["model"], **body})
    assert answer.status_code == 400
    assert "user" in answer.text
    assert "assistant" in answer.text


@pytest.mark.parametrize("role", ["system", "tool", "developer", "function", "assistant"])
async def test_roles_in_common_use_are_answered(role: str, http: httpx.AsyncClient) -> None:
    messages = [*CHAT["messages"], {"role": role, "content": "x"}]
    assert (await ok(http, CHAT, messages=messages))["choices"]


async def test_fields_are_refused_by_their_json_names(http: httpx.AsyncClient) -> None:
    for more, param in (
        ({"top_p": 3}, "top_p"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"temperature": 1000}, "temperature"),
    ):
        answer = await post(http, CHAT, **more)
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, param)
        assert error["message"].startswith(param)
        assert answer.headers["x-should-retry"] == "false"


async def test_a_full_queue_says_when_to_retry(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.script = [QueueFull("the queue is full: retry", retry_after_s=2.5)]
    for stream in (False, True):
        answer = await post(http, CHAT, stream=stream)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "3"  # not before the time that is told
        assert answer.headers["retry-after-ms"] == "2500"
        assert error_of(answer)["code"] == "queue_full"


async def test_more_prompts_than_there_are_places_can_never_be_served(
    front: Front, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to retry, a client would come back for ever, and throw away work each time."""
    monkeypatch.setattr(front.engine.places, "capacity", 3)
    for prompts, n in ((4, 1), (2, 2)):
        answer = await post(http, TEXT, prompt=["Hi"] * prompts, n=n)
        assert answer.status_code == 400
        assert answer.headers["x-should-retry"] == "false"
        error = error_of(answer)
        assert error["param"] == "prompt"
        assert "4 sequences" in error["message"]
        assert "at most 3" in error["message"]
    assert front.engine.submitted == []
    assert len((await ok(http, TEXT, prompt=["Hi"] * 3))["choices"]) == 3


async def test_several_prompts_need_one_place_and_are_refused_before_any_starts(
    front: Front, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front.engine.places, "capacity", 3)
    front.engine.pace = asyncio.Semaphore(0)
    running = [asyncio.create_task(post(http, TEXT)) for _ in range(2)]
    await until(lambda: front.engine.in_flight == 2)
    running.append(asyncio.create_task(post(http, TEXT, prompt=["Hi"] * 3)))
    await until(lambda: front.engine.in_flight == 3)
    answer = await post(http, TEXT, prompt=["Hi"] * 3)
    assert answer.status_code == 429
    assert answer.headers["x-should-retry"] == "true"
    assert len(front.engine.submitted) == 3
    for _ in range(100):
        front.engine.pace.release()
    for call in running:
        assert (await call).status_code == 200
    assert len((await running[-1]).json()["choices"]) == 3
    assert front.engine.places.taken == 0


async def test_an_error_in_a_stream_is_an_event_and_its_end(
    front: Front, http: httpx.AsyncClient
) -> None:
    front.engine.script = [SequenceOutput(1, [1000]), NonFiniteOutput("not finite: report it")]
    answer = await post(http, TEXT, stream=True)
    assert answer.status_code == 200
    first, last, rest = answer.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], rest) == ("non_finite_output", "")


async def test_a_bug_is_told_by_its_request_id_only(
    front: Front, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(front.engine, "generate", broken)
    answer = await post(http, CHAT)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error_of(answer)["message"]
    monkeypatch.setattr(Registry, "list", broken)
    answer = await http.get("/v1/models")
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in error_of(answer)["message"]


async def test_request_ids_are_the_callers_if_they_can_be(http: httpx.AsyncClient) -> None:
    given = await http.get("/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    odd = await http.get("/health", headers={"x-request-id": "a b"})
    assert len(odd.headers["x-request-id"]) == 32
    answer = await http.post("/v1/completions", json=TEXT, headers={"x-request-id": "mine-2"})
    assert answer.json()["id"] == "cmpl-mine-2"


# ------------------------------------------------------------------------------- ends


async def test_a_client_that_disconnects_ends_the_work(
    front: Front, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()
    generate = front.engine.generate

    async def watched(*args: Any, **kwargs: Any) -> AsyncIterator[SequenceOutput]:
        begun.set()
        try:
            async with aclosing(cast(Any, generate(*args, **kwargs))) as outputs:
                async for output in outputs:
                    yield output
        finally:
            ended.set()

    monkeypatch.setattr(front.engine, "generate", watched)
    for given in (CHAT, {**TEXT, "prompt": ["One", "Two"]}):
        for stream in (False, True):
            front.engine.reset()
            begun.clear()
            ended.clear()
            front.engine.pace = asyncio.Semaphore(1)
            call = asyncio.create_task(post(http, given, stream=stream))
            await begun.wait()
            call.cancel()
            await asyncio.wait({call})
            await ended.wait()
            await until(lambda: front.engine.in_flight == 0)
            assert front.engine.cancelled == len(front.engine.submitted)


async def test_nothing_keeps_the_body_of_a_refused_request(
    front: Front, http: httpx.AsyncClient
) -> None:
    long = "0 " * 3000
    chat = {**CHAT, "messages": [{"role": "user", "content": long}]}
    with collected() as garbage:
        for code, given in (
            ("context_length_exceeded", {**TEXT, "prompt": long}),
            ("context_length_exceeded", {**TEXT, "prompt": "word " * 40_000}),
            ("context_length_exceeded", chat),
            ("invalid_field", {**TEXT, "prompt": long, "top_p": "much"}),
        ):
            for stream in (False, True):
                assert error_of(await post(http, given, stream=stream))["code"] == code
    assert garbage.large(5000) == []


async def test_health_follows_the_engine_and_version_is_told(
    front: Front, http: httpx.AsyncClient
) -> None:
    assert (await http.get("/health")).json() == {"status": "serving"}
    front.engine.set_health(False)
    try:
        down = await http.get("/health")
    finally:
        front.engine.set_health(True)
    assert (down.status_code, down.json()) == (503, {"status": "engine_failed"})
    assert (await http.get("/version")).json()["version"]


async def test_requests_are_counted_by_known_paths(
    front: Front, http: httpx.AsyncClient
) -> None:
    await ok(http, CHAT)
    await http.get("/v1/secret-name")
    await http.get("/v1/models/secret-name")
    scraped = await front.metrics()
    assert 'veneer_http_requests_total{path="/v1/chat/completions",status="200"}' in scraped
    assert 'veneer_http_requests_total{path="other",status="404"}' in scraped
    assert 'veneer_http_requests_total{path="/v1/models",status="404"}' in scraped
    assert "secret-name" not in scraped
