"""Tools, chat templates that know them, and what clients make of the answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.rpc.front_harness import Front

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}

_START = "{% for m in messages %}{{ m.role }}: {{ m.content }}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments.city }}"
    "{% endfor %}"
)
_END = "{{ m.tool_call_id }};{% endfor %}"
TEMPLATES = {
    "hermes": "{{ tools | tojson if tools }}<tool_call>" + _START + _CALLS + _END,
    "llama3_json": "{{ tools | tojson if tools }}<|python_tag|>" + _START + _CALLS + _END,
    "mistral": "{{ tools | tojson if tools }}[TOOL_CALLS]" + _START + _CALLS + _END,
}


@asynccontextmanager
async def long_context(front: Front) -> AsyncIterator[None]:
    """The fake engine's context is otherwise too short for tools."""
    info = front.engine.info
    front.engine.info = msgspec.structs.replace(
        info, context_length=4000, kv_cache_tokens=4000, longest_sequence=4000
    )
    try:
        yield
    finally:
        front.engine.info = info


def outputs(tokenizer: TextTokenizer, text: str, finish: str = "stop") -> list[SequenceOutput]:
    """What an engine sends for a text, a token at a time."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    last = len(ids) - 1
    return [
        msgspec.structs.replace(
            SequenceOutput(sequence=1, tokens=[token]), finish=finish if at == last else None
        )
        for at, token in enumerate(ids)
    ]


def joined(chunks: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """What a client makes of a stream's chunks: the message, and why it ended."""
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    finish = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            finish = choice["finish_reason"] or finish
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"]
                    assert call["type"] == "function"
                    message["tool_calls"].append({"name": call["function"]["name"], "text": ""})
                message["tool_calls"][call["index"]]["text"] += call["function"]["arguments"]
            if (function := delta.get("function_call")) is not None:
                if "name" in function:
                    message["function_call"] = {"name": function["name"], "text": ""}
                message["function_call"]["text"] += function["arguments"]
    return message, finish


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and parsed arguments of a whole answer's calls."""
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]


def names_of(tools: Sequence[dict[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]
