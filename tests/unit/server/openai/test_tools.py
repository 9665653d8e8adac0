"""Tools over HTTP: what a caller sends, what the model is shown, and what comes back."""

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

TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK = {**CHAT, "max_tokens": None, "tools": TOOLS}
PARIS = {"city": "Paris"}
FORCED = (
    '[{"name": "weather", "arguments": {"city": "Paris"}},{"name": "clock", "arguments": {}}]'
)
BOTH = [("weather", PARIS), ("clock", {})]
WRITTEN = {
    "hermes": 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Paris"}}; '
    '{"name": "clock", "parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, '
    '{"name": "clock", "arguments": {}}]',
}


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _long(front: Front) -> AsyncIterator[None]:
    async with long_context(front):
        yield


def says(front: Front, tokenizer: TextTokenizer, text: str, finish: str = "stop") -> None:
    front.engine.script = list(outputs(tokenizer, text, finish))


def shown(front: Front, tokenizer: TextTokenizer) -> str:
    """The last prompt."""
    return tokenizer.decode(front.engine.submitted[-1].prompt)


@pytest.mark.parametrize("family", TEMPLATES)
async def test_calls_come_back_whole_and_streamed(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path, family: str
) -> None:
    await front.push(make_adapter(tmp_path, template=TEMPLATES[family]), "fam")
    says(front, tokenizer, WRITTEN[family])
    given = {**ASK, "model": "fam"}
    choice = (await ok(http, given))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert calls_of(choice["message"]) == BOTH
    assert choice["message"]["content"] == ("Let me look.\n" if family == "hermes" else None)
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    streamed, finish = joined(await events(http, given))
    assert finish == "tool_calls"
    assert [(c["name"], json.loads(c["text"])) for c in streamed["tool_calls"]] == BOTH
    assert streamed["content"] == (choice["message"]["content"] or "")
    only = (await ok(http, given, parallel_tool_calls=False))["choices"][0]
    assert calls_of(only["message"]) == BOTH[:1]


@pytest.mark.parametrize("family", [None, *TEMPLATES])
async def test_forced_calls_do_not_depend_on_the_template(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    family: str | None,
) -> None:
    given = ASK
    if family is not None:
        await front.push(make_adapter(tmp_path, template=TEMPLATES[family]), "fam")
        given = {**ASK, "model": "fam"}
    says(front, tokenizer, FORCED)
    choice = (await ok(http, given, tool_choice="required"))["choices"][0]
    assert (choice["finish_reason"], calls_of(choice["message"])) == ("tool_calls", BOTH)
    assert choice["message"]["content"] is None
    streamed, finish = joined(await events(http, given, tool_choice="required"))
    assert finish == "tool_calls"
    assert [(c["name"], json.loads(c["text"])) for c in streamed["tool_calls"]] == BOTH

    says(front, tokenizer, json.dumps(PARIS))
    choice = (await ok(http, given, tool_choice=NAMED))["choices"][0]
    # With a function that was asked for by name, OpenAI and vLLM say stop.
    assert (choice["finish_reason"], calls_of(choice["message"])) == ("stop", BOTH[:1])
    streamed, finish = joined(await events(http, given, tool_choice=NAMED))
    assert (finish, json.loads(streamed["tool_calls"][0]["text"])) == ("stop", PARIS)


async def test_a_forced_call_constrains_the_output(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    says(front, tokenizer, FORCED)
    await ok(http, ASK, tool_choice="required", parallel_tool_calls=False)
    constraint = front.engine.submitted[-1].constraint
    assert constraint is not None
    schema = json.loads(constraint.text)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    # As in vLLM, the call takes the place of a response format.
    await ok(http, ASK, tool_choice=NAMED, response_format={"type": "json_object"})
    constraint = front.engine.submitted[-1].constraint
    assert constraint is not None
    assert json.loads(constraint.text)["required"] == ["city"]
    await ok(http, ASK)
    assert front.engine.submitted[-1].constraint is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cut_call_says_length(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, stream: bool
) -> None:
    says(front, tokenizer, FORCED[:50], "length")
    if stream:
        message, finish = joined(await events(http, ASK, tool_choice="required"))
        [call] = message["tool_calls"]
        text = call["text"]
    else:
        choice = (await ok(http, ASK, tool_choice="required"))["choices"][0]
        [call] = choice["message"]["tool_calls"]
        finish, text = choice["finish_reason"], call["function"]["arguments"]
    assert finish == "length"
    assert json.dumps(PARIS).startswith(text)


async def test_the_older_functions(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    given = {**CHAT, "max_tokens": None, "functions": [WEATHER["function"]]}
    says(front, tokenizer, WRITTEN["hermes"])
    choice = (await ok(http, given))["choices"][0]
    assert choice["finish_reason"] == "function_call"
    called = choice["message"]["function_call"]
    assert (called["name"], json.loads(called["arguments"])) == ("weather", PARIS)
    assert "tool_calls" not in choice["message"]
    streamed, finish = joined(await events(http, given))
    assert (finish, streamed["function_call"]["name"]) == ("function_call", "weather")
    assert json.loads(streamed["function_call"]["text"]) == PARIS

    says(front, tokenizer, json.dumps(PARIS))
    choice = (await ok(http, given, function_call={"name": "weather"}))["choices"][0]
    assert (choice["finish_reason"], choice["message"]["function_call"]) == (
        "stop",
        {"name": "weather", "arguments": json.dumps(PARIS)},
    )


async def test_an_answer_without_calls_is_text(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    says(front, tokenizer, "It is <b>warm</b>.")
    choice = (await ok(http, ASK))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        "It is <b>warm</b>.",
        "stop",
    )
    assert "tool_calls" not in choice["message"]


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
HISTORY = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
]
OLDER = [
    HISTORY[0],
    {"role": "assistant", "content": None, "function_call": CALL["function"]},
    {"role": "function", "name": "weather", "content": "sunny"},
]


async def test_templates_get_tools_and_earlier_calls(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path, template=TEMPLATES["hermes"]), "fam")
    await ok(http, {**ASK, "model": "fam", "max_tokens": 1}, messages=HISTORY)
    prompt = shown(front, tokenizer)
    assert prompt.startswith(json.dumps(TOOLS))
    assert "assistant: weather=Paris" in prompt, "arguments are an object for templates"
    assert "tool: sunnyabcdefghi" in prompt
    await ok(http, {**CHAT, "model": "fam", "max_tokens": 1}, messages=OLDER)
    prompt = shown(front, tokenizer)
    assert "assistant: weather=Paris" in prompt
    assert "tool: sunny" in prompt
    await ok(http, {**ASK, "model": "fam", "max_tokens": 1}, tool_choice="none")
    assert "weather" not in shown(front, tokenizer), (
        "a tool that must not be called is not shown"
    )


async def test_a_template_without_tools_gets_them_as_text(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    await ok(http, {**ASK, "max_tokens": 1}, messages=HISTORY)
    prompt = shown(front, tokenizer)
    for tool in TOOLS:
        assert json.dumps(tool) in prompt
    assert (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        in prompt
    )
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    says(front, tokenizer, WRITTEN["hermes"])
    assert calls_of((await ok(http, ASK))["choices"][0]["message"]) == BOTH


UNKNOWN = (
    "{% if tools %}<function=f>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


async def test_an_unknown_format_is_refused_for_auto_only(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path, template=UNKNOWN), "fam")
    answer = await post(http, {**ASK, "model": "fam"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "tool_choice")
    says(front, tokenizer, FORCED)
    await ok(http, {**ASK, "model": "fam"}, tool_choice="required")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"tools": [{"type": "custom", "custom": {"name": "x"}}], "tool_choice": "required"},
            "tool_choice",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [CLOCK] * 129}, "tools"),
        (
            {"tools": [{"function": {"name": "f", "description": "x" * (128 << 10)}}]},
            "tools",
        ),
        ({"tool_choice": "every"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [CLOCK["function"]]}, "functions"),
        ({"tools": [], "function_call": {"name": "x"}}, "function_call"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages[0].tool_calls",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 129}
                ]
            },
            "messages[0].tool_calls",
        ),
    ],
)
async def test_what_does_not_fit_is_refused(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await post(http, {**ASK, **fields})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_samples_are_read_apart(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    says(front, tokenizer, WRITTEN["hermes"])
    choices = (await ok(http, ASK, n=3))["choices"]
    assert [calls_of(choice["message"]) for choice in choices] == [BOTH] * 3
