"""Send tool prompts in three formats to a running server, mixed with plain requests.

Forced calls must fit their tool's schema, and a streamed answer must equal the whole answer.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from typing import Any, Final

import httpx

_CHAT: Final = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
_SHOWN: Final = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}\nCall them as "
TEMPLATES: Final = {
    "hermes": _SHOWN + "<tool_call>{}</tool_call><|im_end|>\n{% endif %}" + _CHAT,
    "llama3_json": _SHOWN + '<|python_tag|>{"name": }<|im_end|>\n{% endif %}' + _CHAT,
    "mistral": _SHOWN + "[TOOL_CALLS] []<|im_end|>\n{% endif %}" + _CHAT,
}
"""A chat template of each format, for a base with ChatML's special tokens."""

_ASK: Final = (
    "What is the weather in Paris?",
    "Book a table for four.",
    "Remind me at nine.",
    "Translate good morning.",
    "How far is the moon?",
    "Send mail to Ana: 日本 🙂.",
)


def with_template(adapter: Path, folder: Path, format_: str) -> Path:
    """Copy an adapter and give it one of `TEMPLATES`."""
    copytree(adapter, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[format_], encoding="utf-8")
    return folder


@dataclass
class Outcome:
    """Counts of the checked answers, and problems.

    Attributes:
        calls: forced calls that were checked, both whole and streamed.
        problems: answers that were wrong, with their requests.
    """

    prompts: int = 0
    calls: int = 0
    plain: int = 0
    problems: list[str] = field(default_factory=list)


def _schema(random_: random.Random) -> dict[str, Any]:
    """Make a random schema of arguments that a model ends by itself."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 12},
        {"enum": ["red", "größer", 'a"b']},
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        {"$ref": "#/$defs/place"},
    ]
    names = random_.sample(["city", "count", "when", "größe", "tags"], random_.randrange(1, 4))
    place = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {name: random_.choice(kinds) for name in names},
        "required": names,
        "additionalProperties": False,
        "$defs": {"place": place},
    }


def _request(random_: random.Random, model: str) -> dict[str, Any]:
    tools = [
        {"type": "function", "function": {"name": f"tool_{n}", "parameters": _schema(random_)}}
        for n in range(random_.randrange(1, 4))
    ]
    named = {"type": "function", "function": {"name": "tool_0"}}
    return {
        "model": model,
        "messages": [{"role": "user", "content": random_.choice(_ASK)}],
        "tools": tools,
        "tool_choice": random_.choice(["required", named]),
        "parallel_tool_calls": random_.random() < 0.2,
        "max_tokens": 400,
        "temperature": 0.8,
        "seed": random_.randrange(1 << 32),
    }


async def check_tool_calls(
    address: str,
    models: Sequence[str],
    *,
    prompts: int,
    seed: int,
    at_once: int = 8,
) -> Outcome:
    """Send ``prompts`` requests with forced calls, each both whole and streamed, and with every
    second one a plain request.

    Args:
        address: HOST:PORT of the OpenAI port.
    """
    random_ = random.Random(seed)
    outcome = Outcome()
    free = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(
        base_url=f"http://{address}/v1", trust_env=False, timeout=600
    ) as http:

        async def one(given: dict[str, Any], plain: bool) -> None:
            async with free:
                await _check(http, given, outcome)
                if plain:
                    kept = {key: given[key] for key in ("model", "messages", "seed")}
                    whole, streamed = await _both(http, {**kept, "max_tokens": 8})
                    outcome.plain += 1
                    if whole != streamed or whole[1] or whole[2] == "tool_calls":
                        outcome.problems.append(f"plain {given}: {whole} {streamed}")

        async with asyncio.TaskGroup() as group:
            for at in range(prompts):
                given = _request(random_, models[at % len(models)])
                group.create_task(one(given, plain=at % 2 == 0))
    return outcome


_Said = tuple[str, list[tuple[str, str]], str]
"""Content, calls (name, arguments) and finish reason."""


async def _check(http: httpx.AsyncClient, given: dict[str, Any], outcome: Outcome) -> None:
    whole, streamed = await _both(http, given)
    outcome.prompts += 1
    named = isinstance(given["tool_choice"], dict)
    schemas = {
        tool["function"]["name"]: tool["function"]["parameters"] for tool in given["tools"]
    }
    import jsonschema  # a second of every worker that collects tests

    for content, calls, finish in (whole, streamed):
        try:
            assert not content, "text beside forced calls"
            assert calls, "no calls"
            assert finish == ("stop" if named else "tool_calls"), finish
            assert given["parallel_tool_calls"] or len(calls) == 1, "several calls"
            for name, arguments in calls:
                jsonschema.validate(json.loads(arguments), schemas[name])
                outcome.calls += 1
        except (AssertionError, KeyError, ValueError, jsonschema.ValidationError) as error:
            outcome.problems.append(f"{given}: {calls}: {error}")
    if whole != streamed:
        outcome.problems.append(f"{given}: whole {whole}, streamed {streamed}")


async def _both(http: httpx.AsyncClient, given: dict[str, Any]) -> tuple[_Said, _Said]:
    return await _whole(http, given), await _streamed(http, given)


async def _whole(http: httpx.AsyncClient, given: dict[str, Any]) -> _Said:
    answer = await http.post("/chat/completions", json=given)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return (
        message["content"] or "",
        [(call["name"], call["arguments"]) for call in calls],
        choice["finish_reason"],
    )


async def _streamed(http: httpx.AsyncClient, given: dict[str, Any]) -> _Said:
    content, finish = "", ""
    names, arguments = list[str](), list[str]()
    async with http.stream(
        "POST", "/chat/completions", json={**given, "stream": True}
    ) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            content += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
            for call in choice["delta"].get("tool_calls", ()):
                if "name" in call["function"]:
                    names.append(call["function"]["name"])
                    arguments.append("")
                arguments[call["index"]] += call["function"]["arguments"]
    return content, list(zip(names, arguments, strict=True)), finish
