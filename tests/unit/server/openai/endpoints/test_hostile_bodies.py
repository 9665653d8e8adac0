"""Every field of the other endpoints with hostile values: always a one-line client error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from veneer_server.openai.fields import CommonFields
from veneer_server.openai.lora import LoadFields, UnloadFields
from veneer_server.openai.messages import CountFields, MessageFields
from veneer_server.openai.ollama import (
    OllamaChatFields,
    OllamaGenerateFields,
    Options,
    ShowFields,
)
from veneer_server.openai.responses import ResponseFields
from veneer_server.openai.tokens import DetokenizeFields, TokenizeFields, TokensFields

from tests.hostile.connection import PostConnection
from tests.hostile.http import FRAGMENTS
from tests.unit.server.openai.kit import BASE
from tests.unit.server.openai.test_hostile_json import shape
from tests.unit.server.rpc.front_harness import Front
from tests.unit.server.rpc.test_hostile_fields import noise

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARK = "\N{SNOWMAN}"

GOOD: dict[str, dict[str, Any]] = {
    "/v1/responses": {"model": BASE, "input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {
        "model": BASE,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
    },
    "/v1/messages/count_tokens": {
        "model": BASE,
        "messages": [{"role": "user", "content": "Hi"}],
    },
    "/inference/v1/generate": {
        "model": BASE,
        "token_ids": [1000],
        "sampling_params": {"max_tokens": 2},
    },
    "/api/chat": {
        "model": BASE,
        "messages": [{"role": "user", "content": "Hi"}],
        "options": {"num_predict": 2},
        "stream": False,
    },
    "/api/generate": {
        "model": BASE,
        "prompt": "Hi",
        "options": {"num_predict": 2},
        "stream": False,
    },
    "/api/show": {"model": BASE},
    "/tokenize": {"model": BASE, "prompt": "Hi"},
    "/detokenize": {"model": BASE, "tokens": [1000]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/a"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}
OWN = {
    # Those that it shares with chats have their own test.
    "/v1/responses": ResponseFields.model_fields.keys() - CommonFields.model_fields.keys(),
    "/v1/messages": MessageFields.model_fields.keys(),
    "/v1/messages/count_tokens": CountFields.model_fields.keys(),
    "/inference/v1/generate": TokensFields.model_fields.keys(),
    "/api/chat": OllamaChatFields.model_fields.keys(),
    "/api/generate": {*OllamaGenerateFields.model_fields, "images", "context", "suffix"},
    "/api/show": ShowFields.model_fields.keys(),
    "/tokenize": TokenizeFields.model_fields.keys(),
    "/detokenize": DetokenizeFields.model_fields.keys(),
    "/v1/load_lora_adapter": LoadFields.model_fields.keys(),
    "/v1/unload_lora_adapter": UnloadFields.model_fields.keys(),
}
INSIDE: list[dict[str, Any]] = [
    {"text": {"format": MARK}},
    {"text": {"format": {"type": MARK}}},
    {"text": {"format": {"type": "json_schema", "name": MARK, "schema": {}}}},
    {"text": {"format": {"type": "json_schema", "name": "a", "schema": MARK}}},
    {"text": {MARK: 1}},
    {"reasoning": {"effort": MARK}},
    {"include": [MARK]},
    {"input": [MARK]},
    {"input": [{"type": MARK}]},
    {"input": [{"role": MARK, "content": "Hi"}]},
    {"input": [{"role": "user", "content": MARK}]},
    {"input": [{"role": "user", "content": [MARK]}]},
    {"input": [{"role": "user", "content": [{"type": MARK, "text": "Hi"}]}]},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": MARK}]}]},
    {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": MARK}]},
    {"input": [{"type": "function_call", "call_id": MARK, "name": MARK, "arguments": "{}"}]},
    {"input": [{"type": "function_call_output", "call_id": MARK, "output": "a"}]},
    {"input": [{"type": "function_call_output", "call_id": "a", "output": [MARK]}]},
    {"input": [{"type": "reasoning", "content": MARK}, {"role": "user", "content": "Hi"}]},
    {
        "input": [
            {"type": "reasoning", "content": [{"text": MARK}]},
            {"role": "assistant", "content": "Hi"},
        ]
    },
    {"tools": [MARK]},
    {"tools": [{"type": MARK, "name": "f"}]},
    {"tools": [{"type": "function", "name": MARK, "strict": True}]},
    {"tools": [{"type": "function", "name": "f", "parameters": MARK, "strict": True}]},
    {"tools": [{"type": "function", "name": "f", "parameters": {"properties": MARK}}]},
    {"tools": [{"type": "function", "name": "f", "strict": MARK, "description": MARK}]},
    {"tools": [{"type": "function", "name": "f"}], "tool_choice": MARK},
    {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": MARK}},
    {
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "function", "name": MARK},
    },
    {
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "allowed_tools", "mode": MARK, "tools": MARK},
    },
    {
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [MARK]},
    },
    {
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": MARK}]},
    },
    {"metadata": MARK},
    {"metadata": {"a": MARK}},
]
"""Nested fields of a response."""

BLOCKS: list[dict[str, Any]] = [
    {"type": MARK},
    {"type": "text", "text": MARK},
    {"type": "text", "text": "a", MARK: 1},
    {"type": "thinking", "thinking": MARK},
    {"type": "tool_use", "id": MARK, "name": "f", "input": {}},
    {"type": "tool_use", "id": "a", "name": MARK, "input": {}},
    {"type": "tool_use", "id": "a", "name": "f", "input": MARK},
    {"type": "tool_use", "id": "a", "name": "f", "input": {"a": MARK}},
    {"type": "tool_result", "tool_use_id": MARK, "content": "a"},
    {"type": "tool_result", "tool_use_id": "a", "content": MARK},
    {"type": "tool_result", "tool_use_id": "a", "content": [MARK]},
    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": MARK}]},
]
OF_MESSAGES: list[dict[str, Any]] = [
    *(
        {"messages": [{"role": role, "content": [block]}]}
        for block in BLOCKS
        for role in ("user", "assistant")
    ),
    {"messages": [MARK]},
    {"messages": [{"role": MARK, "content": "a"}]},
    {"messages": [{"role": "user", "content": MARK}]},
    {"messages": [{"role": "user", "content": [MARK]}]},
    {"system": [MARK]},
    {"tools": [MARK]},
    {"tools": [{"name": MARK}]},
    {"tools": [{"name": "f", "type": MARK, "description": MARK, "strict": MARK}]},
    {"tools": [{"name": "f", "input_schema": MARK, "strict": True}]},
    {"tools": [{"name": "f"}], "tool_choice": {"type": MARK}},
    {"tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": MARK}},
    {"output_config": {"effort": MARK}},
    {"output_config": {"format": {"type": "json_schema", "schema": MARK}}},
    {"metadata": {"user_id": MARK}},
    {"thinking": {"type": "enabled", "budget_tokens": MARK}},
]
"""Nested fields of a message."""


OF_OLLAMA: list[dict[str, Any]] = [
    *({"options": {name: MARK}} for name in (*Options.model_fields, "mirostat", MARK)),
    {"messages": [MARK]},
    {"messages": [{"role": MARK, "content": "Hi"}]},
    {"messages": [{"role": "user", "content": MARK}]},
    {"messages": [{"role": "user", "content": "Hi", "images": MARK}]},
    {"messages": [{"role": "assistant", "tool_calls": [MARK]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"id": MARK, "function": MARK}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": MARK}}]}]},
    {
        "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            {"role": "tool", "content": "a", "tool_name": MARK},
        ]
    },
    {"tools": [MARK]},
    {"tools": [{"type": "function", "function": MARK}]},
]
"""Nested fields of Ollama's chats."""
OF_TOKENS: list[dict[str, Any]] = [
    {"token_ids": [MARK]},
    *(
        {"sampling_params": {name: MARK}}
        for name in ("max_tokens", "temperature", "logprobs", "stop", "n", "prompt", MARK)
    ),
]
"""Nested fields of vLLM's generate."""


def templates(path: str) -> Iterator[dict[str, Any]]:
    for name in sorted(OWN[path]):
        yield {**GOOD[path], name: MARK}
    if path == "/v1/responses":
        for each in INSIDE:
            yield {**GOOD[path], **each}
    if path == "/api/chat":
        for each in OF_OLLAMA:
            yield {**GOOD[path], **each}
    if path == "/inference/v1/generate":
        for each in OF_TOKENS:
            yield {**GOOD[path], **each}
    if path == "/v1/messages":
        for each in OF_MESSAGES:
            yield {**GOOD[path], **each}


@pytest.mark.push
@pytest.mark.parametrize("path", GOOD)
async def test_no_field_is_our_fault(
    path: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    wrong, tried = [], 0
    with caplog.at_level(logging.INFO):
        async with PostConnection(front.addresses["openai"]) as connection:
            for template in templates(path):
                whole = json.dumps(template).encode()
                for fragment in FRAGMENTS:
                    body = whole.replace(json.dumps(MARK).encode(), fragment)
                    caplog.clear()
                    tried += 1
                    answer = await connection.post(path, body)
                    lines = noise(caplog.records)
                    if (problem := shape(answer.status, answer.body)) or lines:
                        wrong.append(f"{body[:120]!r}: {problem} {lines}")
    assert tried >= len(FRAGMENTS) * len(OWN[path])
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong[:40])


async def test_folders_are_looked_at_below_their_root_only(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a root, nothing of the disk is touched whatever the path."""
    touched: list[Any] = []
    monkeypatch.setattr("os.path.realpath", lambda path, **_: touched.append(path))
    async with PostConnection(front.addresses["openai"]) as connection:
        for given in (str(tmp_path), "/dev/zero", "/proc/self/environ", "", "~"):
            body = json.dumps({"lora_name": "a", "lora_path": given}).encode()
            assert (await connection.post("/v1/load_lora_adapter", body)).status == 501
    assert not touched
