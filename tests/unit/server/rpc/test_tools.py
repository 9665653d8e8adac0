"""Tools over gRPC, and through the Python client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from veneer_client import AsyncClient, Chat, ChatMessage, FinishReason, Tool, ToolMode
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import InvalidField
from veneer_server.text.tokenizer import TextTokenizer

from tests.refused import refused
from tests.unit.server.openai.tool_kit import TEMPLATES, long_context, outputs
from tests.unit.server.rpc.front_harness import Front, failure, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "Weather at a place.", SCHEMA)
CLOCK = Tool("clock")
TOOLS = [WEATHER, CLOCK]
ASK = Chat.user("Weather?")
BOTH = [("weather", {"city": "Paris"}), ("clock", {})]
WRITTEN = (
    'Hm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
)
FORCED = (
    '[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock", "arguments": {}}]'
)


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)


@pytest_asyncio.fixture(loop_scope="module")
async def client(front: Front) -> AsyncIterator[AsyncClient]:
    async with (
        long_context(front),
        AsyncClient(front.addresses["grpc"]) as client,
    ):
        yield client


def parsed(calls: Any) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("choice", [None, ToolMode.REQUIRED])
async def test_calls_come_back_whole_and_streamed(
    front: Front, client: AsyncClient, tokenizer: TextTokenizer, choice: ToolMode | None
) -> None:
    front.engine.script = list(outputs(tokenizer, WRITTEN if choice is None else FORCED))
    options: Any = {"tools": TOOLS} | ({} if choice is None else {"tool_choice": choice})
    answer = await client.generate(ASK, n=2, **options)
    said = "Hm.\n" if choice is None else ""
    for sample in (answer, *answer.others):
        assert (sample.text, parsed(sample.tool_calls)) == (said, BOTH)
        assert sample.finish_reason is FinishReason.TOOL_CALLS
    constrained = front.engine.submitted[-1].constraint
    assert (constrained is None) == (choice is None)

    stream = client.generate_stream(ASK, **options)
    text, names, arguments = "", list[str](), list[str]()
    async for chunk in stream:
        text += chunk.text
        for piece in chunk.tool_calls:
            if piece.name:
                assert (piece.index, piece.arguments) == (len(names), "")
                assert piece.id
                names.append(piece.name)
                arguments.append("")
            arguments[piece.index] += piece.arguments
    assert (text, list(zip(names, map(json.loads, arguments), strict=True))) == (said, BOTH)
    assert stream.final.finish_reason is FinishReason.TOOL_CALLS


async def test_a_named_tool(
    front: Front, client: AsyncClient, tokenizer: TextTokenizer
) -> None:
    front.engine.script = list(outputs(tokenizer, '{"city": "Paris"}'))
    answer = await client.generate(ASK, tools=TOOLS, tool_choice="weather")
    assert (parsed(answer.tool_calls), answer.finish_reason) == (BOTH[:1], FinishReason.STOP)


async def test_the_template_sees_tools_and_earlier_calls(
    front: Front, client: AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path, template=TEMPLATES["mistral"]), "fam")
    front.engine.script = list(
        outputs(tokenizer, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]')
    )
    answer = await client.generate(ASK, adapter="fam", tools=TOOLS)
    [call] = answer.tool_calls
    chat = Chat(
        (
            *ASK.messages,
            ChatMessage("assistant", answer.text, answer.tool_calls),
            ChatMessage("tool", "sunny", tool_call_id=call.id, tool_name=call.name),
        )
    )
    await client.generate(chat, adapter="fam", tools=TOOLS, tool_choice=ToolMode.NONE)
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert "assistant: weather=Paris;" in prompt
    assert f"tool: sunny{call.id};" in prompt
    assert "Weather at a place" not in prompt, "a tool that must not be called is not shown"
    shown = tokenizer.decode(front.engine.submitted[0].prompt)
    assert json.dumps(SCHEMA) in shown


async def test_a_strict_tool_constrains_calls_that_begin(
    front: Front, client: AsyncClient, tokenizer: TextTokenizer
) -> None:
    """As over HTTP: text is free, the arguments of a call are not."""
    front.engine.script = list(outputs(tokenizer, WRITTEN))
    answer = await client.generate(ASK, tools=[replace(WEATHER, strict=True), CLOCK])
    assert parsed(answer.tool_calls) == BOTH
    held = front.engine.submitted[-1].constraint
    assert held is not None
    assert held.kind == "grammar"
    assert '"city"' in held.text
    long = {"properties": {"a": {"enum": ["x" * 1000 + str(at) for at in range(40)]}}}
    with refused(InvalidField, field="tools"):
        await client.generate(ASK, tools=[Tool("f", "", long, strict=True)])
    front.engine.script = list(outputs(tokenizer, WRITTEN))
    await client.generate(ASK, tools=[WEATHER, CLOCK])
    assert front.engine.submitted[-1].constraint is None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tools": [Tool("")]}, "tools[0].name"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": [Tool("f", "x" * (128 << 10))]}, "tools"),
        ({"tools": [Tool("f", "", {"x": "y" * (128 << 10)})]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "f"}, "tool_choice"),
        ({"tool_choice": "f"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "clock", "regex": "a"}, "constraint"),
    ],
)
async def test_what_does_not_fit_is_refused(
    client: AsyncClient, options: Any, field: str
) -> None:
    with refused(InvalidField, field=field):
        await client.generate(ASK, **options)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 5000, '{"a": NaN}', '{"a": "\\ud800"}'])
async def test_parameters_that_are_no_schema_are_refused(front: Front, text: str) -> None:
    request = inference_pb2.GenerateRequest()
    request.messages.messages.add(role="user", content="Hi")
    request.tools.add(name="f", parameters=text)
    failed = await failure(front.inference.Generate(request))
    assert (failed.reason, failed.metadata["field"]) == ("INVALID_FIELD", "tools[0].parameters")


async def test_tools_need_messages(front: Front) -> None:
    request = inference_pb2.GenerateRequest(prompt="Hi")
    request.tools.add(name="f")
    failed = await failure(front.inference.Generate(request))
    assert failed.metadata["field"] == "tools"
