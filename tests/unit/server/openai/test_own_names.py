"""An error names a field of the API that was called, and one that the caller sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_registry.errors import InvalidField
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.openai.kit import BASE, CHAT, TEXT, error_of, ok
from tests.unit.server.openai.test_tools import UNKNOWN
from tests.unit.server.openai.tool_kit import TEMPLATES, WEATHER, long_context, outputs
from tests.unit.server.rpc.fake_engine import CONTEXT
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGE = {**CHAT, "max_tokens": 4}
RESPONSE = {"model": BASE, "input": "Hi", "max_output_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": MESSAGE,
    "/v1/responses": RESPONSE,
    "/v1/responses/input_tokens": RESPONSE,
    "/tokenize": {"messages": CHAT["messages"]},
    "/inference/v1/generate": {"token_ids": [1000], "sampling_params": {"max_tokens": 1}},
    "/api/chat": {"model": BASE, "messages": CHAT["messages"]},
    "/api/generate": {"model": BASE, "prompt": "Hi"},
}

LONG = {"enum": ["x" * 1000 + str(at) for at in range(40)]}
"""Longer than constraints may be."""
LONGER = {"enum": list(range(100_000))}
"""Longer than a schema may be."""

FORMAT = "output_config.format.schema"


def message_format(schema: Any) -> dict[str, Any]:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def text_format(schema: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}


def older_format(schema: Any) -> dict[str, Any]:
    return {"output_format": {"type": "json_schema", "schema": schema}}


def said(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": list(blocks)}]}


def called(count: int, **more: Any) -> list[Any]:
    """Calls as Anthropic has them."""
    call = {"type": "tool_use", "name": "f", "input": more}
    return [{**call, "id": str(at)} for at in range(count)]


CALLS = [
    {"type": "function_call", "call_id": str(at), "name": "f", "arguments": "{}"}
    for at in range(129)
]


async def told(http: httpx.AsyncClient, path: str, more: dict[str, Any]) -> tuple[Any, str]:
    """The field and the message of a refusal."""
    answer = await http.post(path, json={**BODIES[path], **more})
    assert answer.status_code == 400, answer.text
    if path.startswith("/api/"):
        return None, answer.json()["error"]
    error = error_of(answer)
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/v1/messages", message_format(LONG), FORMAT),
        ("/v1/messages", message_format(LONGER), FORMAT),
        ("/v1/messages", older_format(LONG), "output_format.schema"),
        (
            "/v1/messages",
            {"tools": [{"name": "f", "input_schema": []}]},
            "tools[0].input_schema",
        ),
        ("/v1/messages", said(*called(129)), "messages[0].content"),
        ("/v1/messages", said(*called(2, a="x" * 200_000)), "messages[0].content"),
        ("/v1/responses", text_format(LONG), "text.format.schema"),
        ("/v1/responses", text_format(LONGER), "text.format.schema"),
        ("/v1/responses", {"max_output_tokens": 99_999}, "max_output_tokens"),
        ("/v1/responses", {"input": CALLS}, "input[128]"),
        ("/v1/responses", {"guided_json": LONG}, "guided_json"),
        ("/v1/chat/completions", {"guided_json": LONG}, "guided_json"),
        ("/v1/chat/completions", {"guided_json": json.dumps(LONG)}, "guided_json"),
        (
            "/v1/chat/completions",
            {"structured_outputs": {"regex": ""}},
            "structured_outputs.regex",
        ),
        ("/v1/chat/completions", {"guided_choice": []}, "guided_choice"),
        (
            "/v1/chat/completions",
            {"max_tokens": None, "max_completion_tokens": 0},
            "max_completion_tokens",
        ),
        (
            "/v1/chat/completions",
            {"functions": [WEATHER["function"]], "function_call": {"name": "g"}},
            "function_call",
        ),
        ("/v1/completions", {"regex": "a" * 40_000}, "regex"),
        ("/inference/v1/generate", {"sampling_params": {"guided_regex": ""}}, "guided_regex"),
        ("/api/chat", {"format": LONG}, None),
        ("/api/generate", {"format": LONGER}, None),
        ("/api/generate", {"format": LONG, "raw": True}, None),
    ],
)
async def test_a_field_is_named_as_it_was_sent(
    front: Front, http: httpx.AsyncClient, path: str, more: dict[str, Any], param: str | None
) -> None:
    field, message = await told(http, path, more)
    assert field == param
    assert message.startswith(param or "format ")
    assert not front.engine.submitted


@pytest.mark.parametrize(
    ("path", "more", "name"),
    [
        ("/v1/messages", message_format({}), FORMAT),
        ("/v1/responses", text_format({}), "text.format.schema"),
        ("/v1/chat/completions", {"guided_regex": "a"}, "guided_regex"),
        ("/inference/v1/generate", {"sampling_params": {"guided_regex": "a"}}, "guided_regex"),
        ("/api/chat", {"format": {}}, "format"),
        ("/api/generate", {"format": {}, "raw": True}, "format"),
    ],
)
async def test_what_the_engine_refuses_is_named_as_it_was_sent(
    front: Front, http: httpx.AsyncClient, path: str, more: dict[str, Any], name: str
) -> None:
    for field in ("constraint.json_schema", "constraint"):
        error = InvalidField(f"{field} cannot be used: no", metadata={"field": field})
        front.engine.script = [error]
        param, message = await told(http, path, {**more, "stream": False})
        assert message == f"{name} cannot be used: no"
        assert param == (None if path.startswith("/api/") else name)


async def test_two_constraints_are_named_as_they_were_sent(http: httpx.AsyncClient) -> None:
    both = {**text_format({}), "guided_json": {"type": "string"}}
    param, message = await told(http, "/v1/responses", both)
    assert (param, "text.format.schema" in message) == ("guided_json", True)
    forced = {"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}
    assert (await told(http, "/v1/chat/completions", forced))[0] == "guided_regex"


async def test_the_least_number_of_tokens_is_compared_by_the_apis_name(
    http: httpx.AsyncClient,
) -> None:
    _, message = await told(http, "/v1/responses", {"min_tokens": 5})
    assert "max_output_tokens, 4" in message
    _, message = await told(http, "/v1/chat/completions", {"min_tokens": 5})
    assert "at most max_tokens, 4" in message


LONG_TEXT = "long " * CONTEXT
TURNS = {"messages": [{"role": "user", "content": LONG_TEXT}]}
FAR = {"messages": [{"role": "user", "content": "x" * 3_000_000}]}


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/v1/chat/completions", TURNS, "messages"),
        ("/v1/completions", {"prompt": LONG_TEXT}, "prompt"),
        ("/v1/messages", TURNS, "messages"),
        ("/v1/messages/count_tokens", FAR, "messages"),
        ("/v1/responses", {"input": LONG_TEXT}, "input"),
        ("/v1/responses", {"input": "x" * 3_000_000}, "input"),
        ("/v1/responses/input_tokens", {"input": "x" * 3_000_000}, "input"),
        ("/tokenize", TURNS, "messages"),
        ("/tokenize", {"messages": None, "prompt": LONG_TEXT}, "prompt"),
        ("/inference/v1/generate", {"token_ids": [1000] * CONTEXT}, "token_ids"),
    ],
)
async def test_what_is_too_long_is_named_as_it_was_sent(
    http: httpx.AsyncClient, path: str, more: dict[str, Any], param: str
) -> None:
    answer = await http.post(path, json={**BODIES[path], **more})
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


async def test_calls_that_nobody_could_read_have_a_way_out_at_each_door(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Ollama has no `tool_choice`, and Anthropic's is never ``required``."""
    await front.push(make_adapter(tmp_path, template=UNKNOWN), "fam")
    tool = {"name": "f", "input_schema": {"type": "object"}}
    async with long_context(front):
        _, message = await told(http, "/api/chat", {"model": "fam", "tools": [WEATHER]})
        assert "tool_choice of /v1/chat/completions" in message
        for path, tools in (("/v1/messages", [tool]), ("/v1/chat/completions", [WEATHER])):
            _, message = await told(http, path, {"model": "fam", "tools": tools})
            assert "with `tool_choice`" in message
            assert "required" not in message


async def test_a_schema_is_taken_as_it_is(front: Front, http: httpx.AsyncClient) -> None:
    """Hugging Face's TGI puts one beside its name; other APIs do not."""
    schema = {"name": {"type": "string"}, "schema": {"type": "object"}}
    for path, more in (
        ("/v1/messages", message_format(schema)),
        ("/v1/responses", text_format(schema)),
        ("/api/chat", {"format": schema, "stream": False}),
    ):
        answer = await http.post(path, json={**BODIES[path], **more})
        assert answer.status_code == 200, answer.text
        constraint = front.engine.submitted[-1].constraint
        assert constraint is not None
        assert json.loads(constraint.text) == schema


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "regex", "value": "a+"}},
        {"response_format": {"type": "text"}, "guided_regex": "a+"},
    ],
)
async def test_only_json_leaves_room_for_calls(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    more: dict[str, Any],
) -> None:
    await front.push(make_adapter(tmp_path, template=TEMPLATES["hermes"]), "fam")
    async with long_context(front):
        front.engine.script = list(outputs(tokenizer, "aaa"))
        answer = await ok(http, CHAT, model="fam", tools=[WEATHER], **more)
    assert answer["choices"][0]["message"]["content"] == "aaa"
    constraint = front.engine.submitted[-1].constraint
    assert constraint is not None
    assert (constraint.kind, constraint.text) == ("regex", "a+")
