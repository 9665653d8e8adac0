"""Chat templates with tools: as with Hugging Face; and in words for those that know none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from veneer_server.serving.tool_history import History, PastCall
from veneer_server.text.template import ChatTemplate, in_words, needs_words
from veneer_server.text.template_renderer import Renderer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für einen Ort",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]


def chat(arguments: str = '{"city": "Köln", "days": [1, 2]}') -> list[dict[str, Any]]:
    """As the doors build it."""
    history = History()
    calls = [PastCall("abcdefghi", "weather", arguments)]
    return [
        history.message("system", "Be brief.", field=""),
        history.message("user", "Weather?", field=""),
        history.message("assistant", "", calls, field=""),
        history.message("tool", "sunny", call_id="abcdefghi", name="weather", field=""),
    ]


STYLE = """{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n' }}
        {{- tool | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}
        {%- if tool.function.description is defined %}{{ tool.function.description }}{% endif %}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- set id = tool_call.id %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '<tool_call>' + tool_call.name + id + (tool_call.arguments | tojson) }}
            {%- for name, value in tool_call.arguments | items %}
                {{- name }}={{ value }};{% endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '<|tool|>' + message.tool_call_id + message.name + message['content'] }}
    {%- else %}
        {{- message['role'] + ':' + message['content'] }}
    {%- endif %}
{%- endfor %}"""


@pytest.mark.parametrize("tools", [TOOLS, []])
def test_the_same_text_as_transformers(tools: list[dict[str, Any]]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template(
        [chat()], tools=tools or None, chat_template=STYLE, add_generation_prompt=True
    )
    assert ChatTemplate(STYLE, {}).render(chat(), tools) == expected


@pytest.mark.asyncio
async def test_uploaded_templates_get_the_same() -> None:
    uploaded = Renderer({})
    try:
        rendered = await uploaded.render(STYLE, chat(), tools=TOOLS)
    finally:
        await uploaded.close()
    assert rendered == ChatTemplate(STYLE, {}).render(chat(), TOOLS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (" ", {}),
        ("[1]", [1]),
        ('{"a": 1', '{"a": 1'),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("[" * 201 + "]" * 201, "[" * 201 + "]" * 201),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments_that_are_not_json_stay_text(arguments: str, expected: object) -> None:
    [call] = chat(arguments)[2]["tool_calls"]
    assert call["function"]["arguments"] == expected


def test_in_words() -> None:
    said = in_words(chat(), TOOLS)
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user"]
    assert all(message.keys() == {"role", "content"} for message in said)
    system, _, called, result = (message["content"] for message in said)
    assert system.startswith("Be brief.\n\n# Tools")
    for tool in TOOLS:
        assert json.dumps(tool, ensure_ascii=False) in system
    written = called.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(written) == {
        "name": "weather",
        "arguments": {"city": "Köln", "days": [1, 2]},
    }
    assert result == "<tool_response>\nsunny\n</tool_response>"
    alone = in_words([{"role": "user", "content": "Hi"}], TOOLS)
    assert [message["role"] for message in alone] == ["system", "user"]


def test_plain_chats_need_no_words() -> None:
    assert not needs_words([{"role": "user", "content": "Hi"}], [])
    assert needs_words([{"role": "user", "content": "Hi"}], TOOLS)
    assert needs_words(chat(), [])
