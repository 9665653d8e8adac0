"""Tools that the model may call as it sees fit: which, how, and beside which other output."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.openai.kit import CHAT, error_of, events, ok, post
from tests.unit.server.openai.tool_kit import (
    CLOCK,
    TEMPLATES,
    WEATHER,
    calls_of,
    joined,
    long_context,
    outputs,
)
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
ASK = {**CHAT, "max_tokens": None, "tools": [WEATHER, CLOCK]}
ANSWER = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _long(front: Front) -> AsyncIterator[None]:
    async with long_context(front):
        yield


def says(front: Front, tokenizer: TextTokenizer, text: str) -> None:
    front.engine.script = list(outputs(tokenizer, text))


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


async def test_only_allowed_tools_are_shown_and_called(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    says(front, tokenizer, '[{"name": "clock", "arguments": {}}]')
    choice = (await ok(http, ASK, tool_choice=allowed("required", "clock")))["choices"][0]
    assert calls_of(choice["message"]) == [("clock", {})]
    asked = front.engine.submitted[-1]
    assert asked.constraint is not None
    assert "weather" not in asked.constraint.text + tokenizer.decode(asked.prompt)
    says(front, tokenizer, CALL)
    choice = (await ok(http, ASK, tool_choice=allowed("auto", "weather")))["choices"][0]
    assert calls_of(choice["message"]) == [("weather", {"city": "Paris"})]
    asked = front.engine.submitted[-1]
    assert (asked.constraint, "clock" in tokenizer.decode(asked.prompt)) == (None, False)


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        (allowed("auto", "other"), "tool_choice"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("none", "clock"), "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.allowed_tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["clock"]}},
            "tool_choice.allowed_tools.tools[0]",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}] * 129}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"type": "custom", "custom": {"name": "clock"}}, "tool_choice.type"),
    ],
)
async def test_what_cannot_be_chosen(http: httpx.AsyncClient, choice: Any, param: str) -> None:
    answer = await post(http, {**ASK, "tool_choice": choice})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


@pytest.mark.parametrize("family", TEMPLATES)
async def test_strict_tools_constrain_calls_that_begin(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path, family: str
) -> None:
    template = TEMPLATES[family] + "{# <think> #}"
    await front.push(make_adapter(tmp_path, template=template), "fam")
    given = {**ASK, "model": "fam", "tools": [STRICT, CLOCK]}
    says(front, tokenizer, f"<think>Hm</think>Look.\n{CALL}")
    message = (await ok(http, given))["choices"][0]["message"]
    constraint = front.engine.submitted[-1].constraint
    if family != "hermes":
        assert constraint is None, "nothing tells their calls from text"
        return
    assert constraint is not None
    assert constraint.kind == "grammar"
    assert '"city"' in constraint.text
    # Any text may come first, thinking too.
    assert (message["reasoning_content"], message["content"]) == ("Hm", "Look.\n")
    assert calls_of(message) == [("weather", {"city": "Paris"})]
    streamed, finish = joined(await events(http, given))
    assert (finish, streamed["content"]) == ("tool_calls", "Look.\n")


async def test_a_response_format_leaves_room_for_calls(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    says(front, tokenizer, CALL)
    given = {**ASK, "response_format": FORMAT}
    choice = (await ok(http, given))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert calls_of(choice["message"]) == [("weather", {"city": "Paris"})]
    constraint = front.engine.submitted[-1].constraint
    assert constraint is not None
    assert (constraint.kind, "boolean" in constraint.text) == ("grammar", True)
    says(front, tokenizer, '{"a": true}')
    choice = (await ok(http, given))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a": true}', "stop")
    # vLLM's options are for all of the output.
    await ok(http, ASK, structured_outputs={"json": ANSWER})
    constraint = front.engine.submitted[-1].constraint
    assert constraint is not None
    assert (constraint.kind, json.loads(constraint.text)) == ("json_schema", ANSWER)


async def test_a_response_format_in_other_formats_of_calls(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path, template=TEMPLATES["llama3_json"]), "fam")
    written = '{"name": "weather", "parameters": {}}'
    says(front, tokenizer, written)
    given = {**ASK, "model": "fam", "response_format": {"type": "json_object"}}
    choice = (await ok(http, given))["choices"][0]
    assert choice["message"]["content"] == written, "an answer in the format, not a call"
    constraint = front.engine.submitted[-1].constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"


async def test_schemas_that_are_too_long_are_the_tools(http: httpx.AsyncClient) -> None:
    words = ["x" * 1000 + str(at) for at in range(40)]
    long = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"enum": words}}}}
    given = {**ASK, "tools": [{"type": "function", "function": long}]}
    for more in ({}, {"tool_choice": "required"}):
        answer = await post(http, {**given, **more})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")


async def test_thinking_is_counted(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    template = "<think>{{ messages[0].content }}"
    await front.push(make_adapter(tmp_path, template=template), "thinker")
    given = {**CHAT, "model": "thinker", "max_tokens": 99}
    thought = " one two three four"
    count = len(tokenizer.encode(thought, add_special_tokens=False))
    says(front, tokenizer, f"<think>{thought}</think>Yes.")
    whole = (await ok(http, given, n=2))["usage"]["completion_tokens_details"]
    held = len(tokenizer.encode("</think>", add_special_tokens=False)) - 1
    assert whole == {"reasoning_tokens": 2 * (count + held)}
    *_, last = await events(http, given, n=2, stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens_details"] == whole
    # What is cut before its end is thinking, and what is not begun by the tag is none.
    says(front, tokenizer, f"<think>{thought}")
    details = (await ok(http, given))["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": count}
    says(front, tokenizer, f"{thought}</think>")
    details = (await ok(http, given))["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": 0}
