"""Requests for the gateway's tests, and checks of the shape of answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

BASE = "smollm2-135m"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TEXT = {"model": BASE, "prompt": "Hello there", "max_tokens": 4}


async def post(http: httpx.AsyncClient, given: dict[str, Any], **more: Any) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in given else "/v1/completions"
    return await http.post(path, json={**given, **more})


async def ok(http: httpx.AsyncClient, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = await post(http, given, **more)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def events(http: httpx.AsyncClient, given: dict[str, Any], **more: Any) -> list[Any]:
    """Parsed events of a stream, which must end like OpenAI's."""
    answer = await post(http, given, stream=True, **more)
    assert answer.status_code == 200, answer.text
    # Without the charset, some clients decode events as Latin-1.
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no", "a proxy passes pieces on at once"
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error
