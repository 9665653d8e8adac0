"""Requests to ``/v1/responses``, and what every answer must be."""

from __future__ import annotations

import json
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.unit.server.openai.kit import BASE

ASK: dict[str, Any] = {"model": BASE, "input": "Hi", "max_output_tokens": 4}

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def respond(http: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    """A whole response, in a form that OpenAI's client knows."""
    answer = await http.post("/v1/responses", json={**ASK, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    Response.model_validate(found)
    return found


async def streamed(http: httpx.AsyncClient, **more: Any) -> list[dict[str, Any]]:
    """The events; each must be one that OpenAI's client knows, named by its type, and
    numbered."""
    answer = await http.post("/v1/responses", json={**ASK, **more, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *blocks, last = answer.text.split("\n\n")
    assert last == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        _EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def same(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two requests: ids and times."""
    request_id = response["id"].removeprefix("resp_")
    found = json.loads(json.dumps(response).replace(request_id, "ID"))
    for item in found["output"]:
        if "call_id" in item:
            item["call_id"] = "CALL"
    return {name: value for name, value in found.items() if name != "created_at"}


def assembled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a client makes of a stream's deltas, without ids, checked against what
    the stream itself says at the end of each part."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        at = event.get("output_index")
        if kind == "output_item.added":
            assert at == len(items)
            item = event["item"]
            assert item["status"] == "in_progress"
            items.append({"type": item["type"], "id": item["id"], "text": "", "logprobs": []})
            items[-1] |= {name: item[name] for name in ("name", "call_id") if name in item}
        elif at is not None:
            assert at == len(items) - 1, "one item at a time"
            assert event.get("item_id", items[at]["id"]) == items[at]["id"]
        if kind.endswith(".delta"):
            assert at is not None
            items[at]["text"] += event["delta"]
            items[at]["logprobs"] += event.get("logprobs", [])
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert at is not None
            assert event["text"] == items[at]["text"]
        elif kind == "function_call_arguments.done":
            assert at is not None
            assert event["arguments"] == items[at]["text"]
        elif kind == "output_item.done":
            assert at is not None
            assert text_of(event["item"]) == items[at]["text"]
    return items


def text_of(item: dict[str, Any]) -> str:
    """An item's text, or a call's arguments."""
    if item["type"] == "function_call":
        arguments: str = item["arguments"]
        return arguments
    return "".join(part["text"] for part in item["content"])


def shape(response: dict[str, Any]) -> list[tuple[str, str]]:
    """Type and text of each item."""
    return [(item["type"], text_of(item)) for item in response["output"]]
