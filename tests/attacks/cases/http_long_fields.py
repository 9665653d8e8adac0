"""Hundreds of thousands of numbers in fields that accept any JSON: a schema, variables of a
chat template, a tool, the input of a call, or token ids."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from tests.attacks.case import Bug, Target
from tests.attacks.cases.text_long_prompts import post
from tests.hostile.callers import http_answer

TITLE = "schemas, template variables, tools and call inputs of 500,000 numbers"

BUG = Bug(
    "veneer_server.text.turns",
    "left, todo = most, [value]",
    "left, todo = 1 << 60, [value]",
)

AT_ONCE = 4
SIZE = (4 << 20) - 1000
"""Maximum bytes of the numbers."""


def _numbers(rng: random.Random) -> list[int]:
    digits = rng.randrange(1, 7)
    count = rng.randrange(150_000, min(500_000, SIZE // (digits + 2)))
    return [10 ** (digits - 1)] * count


def _value(rng: random.Random) -> Any:
    numbers = _numbers(rng)
    if rng.random() < 0.5:
        return numbers
    width = rng.randrange(50, 5000)
    return [numbers[at : at + width] for at in range(0, len(numbers), width)]


def _body(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    user = {"role": "user", "content": "Hi"}
    chat: dict[str, Any] = {"model": model, "max_tokens": 1, "messages": [user]}
    value, chats = _value(rng), "/v1/chat/completions"
    match rng.randrange(8):
        case 0:
            schema = {"name": "a", "schema": {"enum": value}}
            wanted = {"type": "json_schema", "json_schema": schema}
            return chats, {**chat, "response_format": wanted}
        case 1:
            text = {"model": model, "prompt": "Hi", "guided_json": {"enum": value}}
            return "/v1/completions", text
        case 2:
            return chats, {**chat, "chat_template_kwargs": {"a": value}}
        case 3:
            function = {"name": "a", "parameters": {"enum": value}}
            return chats, {**chat, "tools": [{"type": "function", "function": function}]}
        case 4:
            call = {"function": {"name": "a", "arguments": {"a": value}}}
            said = {"role": "assistant", "tool_calls": [call]}
            return chats, {**chat, "messages": [user, said]}
        case 5:
            block = {"type": "tool_use", "id": "a", "name": "b", "input": {"a": value}}
            said = {"role": "assistant", "content": [block]}
            return "/v1/messages", {**chat, "messages": [user, said]}
        case 6:
            text = {"format": {"type": "json_schema", "name": "a", "schema": {"enum": value}}}
            return "/v1/responses", {"model": model, "input": "Hi", "text": text}
        case _:
            return "/v1/completions", {"model": model, "prompt": _numbers(rng)}


async def attack(target: Target) -> list[str]:
    """Each request must be refused, and a JSON field before the server writes it as text: the
    error then says that it has more values than allowed, but not how many."""
    wrong: list[str] = []

    async def one(path: str, given: dict[str, Any]) -> None:
        body = json.dumps(given, separators=(",", ":")).encode()
        status, answer = await http_answer(target.openai, post(body, path))
        if status == 429:
            return
        measured = "prompt" in given and "guided_json" not in given
        measured = measured or b"characters as JSON" in answer
        if status != 400 or not measured or len(answer) > 4000:
            wrong.append(f"{path} with {sorted(given)}: {status} {answer[:300]!r}")

    ends = time.monotonic() + target.seconds
    while True:
        bodies = [_body(target.rng, target.adapter) for _ in range(AT_ONCE)]
        await asyncio.gather(*(one(*each) for each in bodies))
        if time.monotonic() >= ends or wrong:
            return sorted(set(wrong))
