"""``POST /v1/messages``: Anthropic's form of a chat, whole and as events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_registry.errors import EngineFailed
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.openai.kit import BASE, CHAT, error_of, ok
from tests.unit.server.openai.tool_kit import TEMPLATES, long_context, outputs
from tests.unit.server.rpc.fake_engine import CONTEXT
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK: dict[str, Any] = {
    "model": BASE,
    "max_tokens": 4,
    "messages": [{"role": "user", "content": "Hi"}],
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather at a place.", "input_schema": SCHEMA}
BASH = {"type": "bash_20250124", "name": "bash"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


async def say(http: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await http.post("/v1/messages", json={**ASK, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def streamed(http: httpx.AsyncClient, **more: Any) -> list[dict[str, Any]]:
    answer = await http.post("/v1/messages", json={**ASK, **more, "stream": True})
    assert answer.status_code == 200, answer.text
    *blocks, last = answer.text.split("\n\n")
    assert last == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of events, as Anthropic's SDK does."""
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    message, arguments, open_ = events[0]["message"], "", -1
    for event in events[1:-1]:
        blocks = message["content"]
        match event["type"]:
            case "content_block_start":
                assert (open_, event["index"]) == (-1, len(blocks))
                open_ = event["index"]
                blocks.append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == open_
                kind = event["delta"]["type"]
                if kind == "input_json_delta":
                    arguments += event["delta"]["partial_json"]
                else:
                    member = kind.removesuffix("_delta")
                    blocks[-1][member] += event["delta"][member]
            case "content_block_stop":
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"], arguments = json.loads(arguments), ""
                open_ = -1
            case _:
                assert event["type"] == "message_delta"
                message |= event["delta"]
                message["usage"] = event["usage"]
    assert open_ == -1
    return message


def same(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two requests."""
    blocks = [{**block, "id": "ID"} if "id" in block else block for block in message["content"]]
    return {**message, "id": "ID", "content": blocks}


async def test_a_message_is_the_chats_answer(front: Front, http: httpx.AsyncClient) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7}
    chat = await ok(http, CHAT, **options, stop=["@"], user="me")
    expected = front.engine.submitted[-1]
    system: Any = [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]
    message = await say(http, **options, stop_sequences=["@"], metadata={"user_id": "me"})
    asked = front.engine.submitted[-1]
    assert (asked.prompt, asked.sampling) == (expected.prompt, expected.sampling)
    said = chat["choices"][0]["message"]["content"]
    assert message["content"] == [{"type": "text", "text": said}]
    assert (message["type"], message["role"], message["model"]) == (
        "message",
        "assistant",
        BASE,
    )
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert message["usage"] == {
        "input_tokens": chat["usage"]["prompt_tokens"] - 16,
        "cache_read_input_tokens": 16,
        "cache_creation_input_tokens": 0,
        "output_tokens": 4,
        "output_tokens_details": {"thinking_tokens": 0},
    }
    assert same(assembled(await streamed(http, **options))) == same(message)
    await ok(http, CHAT, messages=[{"role": "system", "content": "S"}, *CHAT["messages"]])  # type: ignore[misc]
    expected = front.engine.submitted[-1]
    await say(http, system=system)
    assert front.engine.submitted[-1].prompt == expected.prompt
    front.engine.script = [SequenceOutput(1, [1000], finish="stop")]
    assert (await say(http))["stop_reason"] == "end_turn"


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (f"<think>Hm 😀</think>\n\nLook.\n{CALL}\n{CALL}", "thinking text tool_use tool_use"),
        (f"<think>Hm</think>\n\n{CALL}", "thinking tool_use"),
        ("\n\n", "text"),
        ("<think>Hm", "thinking"),
        ("😀", "text"),
    ],
)
async def test_blocks_of_content(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    text: str,
    kinds: str,
    step: int,
) -> None:
    template = TEMPLATES["hermes"] + "{# <think> #}"
    await front.push(make_adapter(tmp_path, template=template), "fam")
    each = list(outputs(tokenizer, text))
    front.engine.script = [
        SequenceOutput(
            1,
            [token for one in each[at : at + step] for token in one.tokens],
            finish=each[at : at + step][-1].finish,
        )
        for at in range(0, len(each), step)
    ]
    given: dict[str, Any] = {"model": "fam", "tools": [WEATHER], "max_tokens": 99}
    async with long_context(front):
        message = await say(http, **given)
        found = [block["type"] for block in message["content"]]
        assert found == kinds.split()
        for block in message["content"]:
            if block["type"] == "tool_use":
                assert (block["name"], block["input"]) == ("weather", {"city": "Paris"})
        called = "tool_use" in found
        assert message["stop_reason"] == ("tool_use" if called else "end_turn")
        assert same(assembled(await streamed(http, **given))) == same(message)
        # What came goes back, with the calls' results.
        turns: list[Any] = [
            *ASK["messages"],
            {"role": "assistant", "content": message["content"]},
        ]
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "sunny"}
            for block in message["content"]
            if block["type"] == "tool_use"
        ]
        turns.append({"role": "user", "content": [*results, {"type": "text", "text": "So?"}]})
        await say(http, **given, messages=turns)
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert prompt.count("sunny") == len(results)
    assert "So?" in prompt


async def test_choices_and_formats(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    async with long_context(front):
        front.engine.script = list(outputs(tokenizer, '{"city": "Paris"}'))
        named = {"type": "tool", "name": "weather"}
        message = await say(http, tools=[WEATHER], tool_choice=named, max_tokens=40)
        assert message["stop_reason"] == "tool_use"
        assert message["content"][0]["input"] == {"city": "Paris"}
        front.engine.script = list(outputs(tokenizer, '{"city": "Par'))
        cut = await say(http, tools=[WEATHER], tool_choice=named, max_tokens=40)
        assert cut["content"][0]["input"] == {}
        front.engine.script = None
        one = {"type": "any", "disable_parallel_tool_use": True}
        await say(http, tools=[WEATHER], tool_choice=one)
        assert front.engine.submitted[-1].constraint is not None
        await say(http, tools=[WEATHER], tool_choice={"type": "none"})
        assert front.engine.submitted[-1].constraint is None
        await say(http, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
        held = front.engine.submitted[-1].constraint
        assert held is not None
        assert json.loads(held.text) == SCHEMA


async def test_what_the_system_says_in_between(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    """Claude Code does. Before the first turn it is one message with the field: templates know
    one, at the beginning."""
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *ASK["messages"],
        {"role": "assistant", "content": "Hm."},
        {"role": "system", "content": "The plan has changed."},
        {"role": "user", "content": "Well?"},
    ]
    await say(http, system="You are a pirate.", messages=turns)
    asked = front.engine.submitted[-1].prompt
    expected = [
        {"role": "system", "content": "You are a pirate.\n\nBe brief."},
        *ASK["messages"],
        *turns[2:3],
        {"role": "system", "content": "The plan has changed."},
        *turns[4:],
    ]
    await ok(http, CHAT, messages=expected)
    assert front.engine.submitted[-1].prompt == asked


async def test_max_tokens_is_a_bound(front: Front, http: httpx.AsyncClient) -> None:
    """Claude Code asks for 32,000, whatever the context is."""
    await say(http, max_tokens=32_000)
    [request] = front.engine.submitted
    assert request.max_tokens == CONTEXT - len(request.prompt)
    answer = await http.post("/v1/messages", json={**ASK, "system": "long " * CONTEXT})
    assert error_of(answer)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}]
)
async def test_a_thread_is_refused_in_the_words_that_sdks_understand(
    http: httpx.AsyncClient, thread: dict[str, Any]
) -> None:
    """The SDK's tool runner then sends the whole conversation. Were `create` accepted, its next
    request would have the result of the call alone."""
    answer = await http.post("/v1/messages", json={**ASK, "thread": thread})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "thread"
    assert error["details"] == {"error_code": "thread_unsupported_request"}


async def test_the_older_name_of_the_format(front: Front, http: httpx.AsyncClient) -> None:
    format_ = {"type": "json_schema", "schema": SCHEMA}
    await say(http, output_format=format_)
    held = front.engine.submitted[-1].constraint
    assert held is not None
    assert json.loads(held.text) == SCHEMA
    twice = {"output_format": format_, "output_config": {"format": format_}}
    await say(http, **twice)
    twice["output_config"] = {"format": {**format_, "schema": {}}}
    answer = await http.post("/v1/messages", json={**ASK, **twice})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "output_format")


async def test_an_answer_continues_the_assistants_turn(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    begun = {"role": "assistant", "content": "The answer is"}
    await say(http, messages=[*ASK["messages"], begun])
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert prompt.endswith("The answer is")


def turn(**members: Any) -> dict[str, Any]:
    return {"messages": [members]}


def block(**members: Any) -> dict[str, Any]:
    return turn(role="user", content=[members])


def past(**members: Any) -> dict[str, Any]:
    return turn(role="assistant", content=[members])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        (turn(role="system", content="Hi"), "messages"),
        (turn(role="tool", content="Hi"), "messages[0].role"),
        (turn(role="user"), "messages[0].content"),
        (turn(role="user", content=[]), "messages[0].content"),
        (turn(role="user", content=["Hi"]), "messages[0].content[0]"),
        (block(type="image", source={}), "messages[0].content[0].type"),
        (block(type="text", text=1), "messages[0].content[0].text"),
        (block(type="tool_use", id="1", name="f", input={}), "messages[0].content[0].type"),
        (block(type="tool_result", content="x"), "messages[0].content[0].tool_use_id"),
        (
            block(type="tool_result", tool_use_id="1", content=[{"type": "image"}]),
            "messages[0].content[0].content[0].type",
        ),
        (past(type="tool_use", id="1", name="f", input="{}"), "messages[0].content[0].input"),
        (past(type="tool_use", name="f", input={}), "messages[0].content[0].id"),
        (
            past(type="tool_use", id="i" * 257, name="f", input={}),
            "messages[0].content[0].id",
        ),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        (past(type="thinking"), "messages[0].content[0].thinking"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [BASH], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [BASH], "tool_choice": {"type": "tool", "name": "bash"}}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "auto", "no": 1}}, "tool_choice.no"),
        ({"compaction": {"type": "auto"}}, "compaction"),
        ({"tools": [{"name": ""}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"thinking": {"type": "very"}}, "thinking.type"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"temperature": 1000}, "temperature"),
        ({"n": 2}, "n"),
    ],
)
async def test_a_bad_field_is_named(
    front: Front, http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/messages", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param
    assert not front.engine.submitted


async def test_tokens_are_counted_as_a_message_has_them(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    shout = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{% endfor %}"
    await front.push(make_adapter(tmp_path, template=shout), "tooled")
    begun = {"role": "assistant", "content": "The answer is"}
    async with long_context(front):
        for more in (
            {},
            {"system": "Be brief."},
            {"tools": [WEATHER]},
            {"tools": [WEATHER], "model": "tooled", "tool_choice": {"type": "any"}},
            {"messages": [*ASK["messages"], begun]},
            {"thinking": {"type": "disabled"}},
        ):
            await say(http, **more)
            expected = len(front.engine.submitted[-1].prompt)
            asked = {k: v for k, v in {**ASK, **more}.items() if k != "max_tokens"}
            answer = await http.post("/v1/messages/count_tokens", json=asked)
            assert answer.json() == {"input_tokens": expected}, more
    assert len(front.engine.submitted) == 6, "counting generates nothing"


async def test_more_tokens_than_fit_are_counted_too(
    front: Front, http: httpx.AsyncClient
) -> None:
    """A program that counts wants to know how much it must leave out."""
    long = [{"role": "user", "content": "word " * 500}]
    counted = await http.post("/v1/messages/count_tokens", json={**ASK, "messages": long})
    assert counted.json()["input_tokens"] > 500
    far = [{"role": "user", "content": "x" * 3_000_000}]
    told = await http.post("/v1/messages/count_tokens", json={**ASK, "messages": far})
    assert (told.status_code, error_of(told)["code"]) == (400, "context_length_exceeded")


async def test_a_stream_that_fails_says_so(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.script = [SequenceOutput(1, [1000]), EngineFailed("gone", retry_after_s=2.0)]
    *_, last = await streamed(http)
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
