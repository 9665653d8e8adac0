"""Every field of both endpoints with hostile values, and odd paths and headers: always a
one-line client error."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import httpx
import pytest
from veneer_server.openai.http.asgi import MAX_BODY

from tests.hostile.connection import PostConnection
from tests.hostile.http import json_cases
from tests.unit.server.openai.kit import BASE, CHAT
from tests.unit.server.rpc.front_harness import Front, make_adapter
from tests.unit.server.rpc.test_hostile_fields import noise

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = {"content-type": "application/json"}
NOT_SERVED = 501


def shape(status: int, body: bytes) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if status == 200:
        return ""
    if status >= 500 and status != NOT_SERVED:
        return f"status {status}: {body[:200]!r}"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError):
        return f"status {status} without an error object: {body[:200]!r}"
    told = error if isinstance(error, str) else error["message"]  # Ollama's form, or OpenAI's
    if "\n" in told or len(told.encode()) > 800:
        return f"a message of {len(told)} characters: {told[:200]}"
    return ""


@pytest.mark.push
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_no_field_of_a_body_is_our_fault(
    path: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    wrong: list[str] = []
    tried = [case for case in json_cases(BASE) if case.path == path]
    assert len(tried) > 2000
    with caplog.at_level(logging.INFO):
        async with PostConnection(front.addresses["openai"]) as connection:
            for case in tried:
                caplog.clear()
                answer = await connection.post(case.path, case.body)
                if problem := shape(answer.status, answer.body):
                    wrong.append(f"{case.name}: {problem}")
                wrong += [f"{case.name}: log: {line}" for line in noise(caplog.records)]
    assert not wrong, f"{len(wrong)} of {len(tried)}:\n" + "\n".join(wrong[:40])


PATHS = [
    "/v1/models/",
    "/v1/models//",
    "/v1/models/%00",
    "/v1/models/%ff",
    "/v1/models/%C3%A9",
    "/v1/models/a@",
    "/v1/models/a@zz",
    "/v1/models/a/b/c",
    "/v1/models/../../etc/passwd",
    "/v1/models/%2e%2e%2f",
    "/v1/models/a%0d%0ab",
    "/v1/models/" + "x" * 8000,
    "/v1/models?limit=-1",
    "/v1/chat/completions/",
    "/v1//chat/completions",
    "/",
    "//",
    "/%",
    "/health/",
    "/%F0%9F%A6%86",
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_no_path_is_our_fault(
    method: str,
    front: Front,
    http: httpx.AsyncClient,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await front.push(make_adapter(tmp_path / "a"), "a")
    wrong: list[str] = []
    for path in (*PATHS, "/v1/models", "/health", "/version", "/v1/chat/completions"):
        caplog.clear()
        answer = await http.request(method, path)
        problem = shape(answer.status_code, answer.content) if method != "HEAD" else ""
        if answer.status_code >= 500 or problem:
            wrong.append(f"{path[:60]}: {answer.status_code} {problem}")
        wrong += [f"{path[:60]}: log: {line}" for line in noise(caplog.records)]
    assert not wrong, "\n".join(wrong)


HEADERS = [
    {},
    {"content-type": ""},
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": "application/json", "content-encoding": "gzip"},
    {"content-type": b"\xff\xfe"},
    {"content-type": "application/json", "x-request-id": b"\xff"},
    {"content-type": "application/json", "x-request-id": "a" * 10_000},
    {"content-type": "application/json", "upgrade": "websocket", "connection": "upgrade"},
    {"content-type": "application/json", "upgrade": "h2c", "connection": "upgrade"},
    {"content-type": "application/json", "expect": "100-continue"},
    {"content-type": "application/json", "authorization": b"Bearer \xff"},
    {"content-type": "application/json", "origin": "https://evil.example"},
    {"content-type": "application/json", "range": "bytes=0-1", "if-none-match": "*"},
]


@pytest.mark.parametrize("at", range(len(HEADERS)))
async def test_no_header_is_our_fault(
    at: int, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    body = httpx.Request("POST", "http://x/", json=CHAT).content
    answer = await http.post("/v1/chat/completions", content=body, headers=HEADERS[at])  # type: ignore[arg-type]
    assert shape(answer.status_code, answer.content) == ""
    assert answer.status_code in (200, 403, 415), answer.text
    assert noise(caplog.records) == []
    assert [r.getMessage() for r in caplog.records if r.name.startswith("uvicorn")] == []


@pytest.mark.parametrize("shown", ["null", "0", '"', "[", "{"])
async def test_a_body_at_the_limit_of_size(http: httpx.AsyncClient, shown: str) -> None:
    body = shown.encode() + b" " * (MAX_BODY - len(shown))
    answer = await http.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert shape(answer.status_code, answer.content) == ""
