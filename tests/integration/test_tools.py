"""Forced calls of tools on the real base; `tests.bench.tool_calls` is the long form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server_harness import Server
from tests.tool_load import TEMPLATES, check_tool_calls, with_template

pytestmark = [pytest.mark.real_base, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.push
async def test_forced_calls_fit_their_schema_with_any_template(
    server: Server, real_adapters: dict[str, Path], tmp_path: Path
) -> None:
    for format_ in TEMPLATES:
        folder = with_template(real_adapters["rank-16"], tmp_path / format_, format_)
        await server.push(folder, f"tools-{format_.replace('_', '-')}")
    models = ["smollm2-135m", *(f"tools-{each.replace('_', '-')}" for each in TEMPLATES)]
    base, *others = [await prompt_tokens(server, model) for model in models]
    assert base not in others, "the adapters' own templates show tools in fewer words"
    seed = random.randrange(1 << 32)
    print("seed", seed)
    outcome = await check_tool_calls(server.openai, models, prompts=12, seed=seed)
    assert outcome.problems == []
    assert outcome.calls >= 24


async def prompt_tokens(server: Server, model: str) -> int:
    """Of a prompt with a tool."""
    tool = {"type": "function", "function": {"name": "paint"}}
    given = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 1}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        answer = await http.post(
            f"http://{server.openai}/v1/chat/completions", json={"model": model, **given}
        )
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens"])


async def test_a_response_calls_or_answers(server: Server) -> None:
    """Both are held to their schemas, whichever the model chooses."""
    schema: Any = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    paint: Any = {"type": "function", "name": "paint", "parameters": schema, "strict": True}
    form: Any = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.openai}/v1",
        api_key="ignored",
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as sdk:
        for choice in ("auto", "none"):
            answer = await sdk.responses.create(
                model="smollm2-135m",
                input="Paint it red.",
                tools=[paint],
                tool_choice=choice,
                parallel_tool_calls=False,
                text={"format": form},
                temperature=0,
                max_output_tokens=60,
            )
            [item] = answer.output
            called = item.type == "function_call"
            text = item.arguments if item.type == "function_call" else answer.output_text
            assert json.loads(text)["colour"] in ("red", "blue")
            assert (answer.status, called and choice == "none") == ("completed", False)


async def test_the_sdk_reads_calls(server: Server) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "paint",
            "parameters": {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "blue"]}},
                "required": ["colour"],
            },
        },
    }
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.openai}/v1",
        api_key="ignored",
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as sdk:
        answer = await sdk.chat.completions.create(
            model="smollm2-135m",
            messages=[{"role": "user", "content": "Paint it red."}],
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
        )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
