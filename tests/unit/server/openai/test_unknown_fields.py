"""What has no effect is accepted, named and counted, as ``--unknown-fields`` says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_server.openai.extensions import MAX_NAMED, Ignored
from veneer_server.openai.fields import IGNORED, ChatFields, parse_fields
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.openai.kit import BASE, CHAT, TEXT, error_of, post
from tests.unit.server.openai.tool_kit import WEATHER, long_context, outputs
from tests.unit.server.rpc.front_harness import Front, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEADER = "veneer-ignored"
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}

CLAUDE_CODE: dict[str, Any] = {
    "model": BASE,
    "max_tokens": 32_000,
    "stream": True,
    "system": [{"type": "text", "text": "You are a coding agent.", **EPHEMERAL}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi", **EPHEMERAL}]},
        {"role": "system", "content": "Plan mode is on."},
    ],
    "tools": [
        {"name": "Bash", "input_schema": {"type": "object"}, "eager_input_streaming": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "thinking": {"type": "adaptive", "display": "summarized"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "medium", "task_budget": {"type": "tokens", "total": 20_000}},
    "metadata": {"user_id": "me"},
}
"""What Claude Code sends, with fewer tools and less text."""

CODEX: dict[str, Any] = {
    "model": BASE,
    "instructions": "You are a coding agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be brief."}],
            "internal_chat_message_metadata_passthrough": {"turn": "1"},
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ],
    "tools": [
        {"type": "function", "name": "exec", "parameters": {"type": "object"}, "strict": False},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
        {"type": "web_search", "external_web_access": True},
        {"type": "namespace", "name": "mcp__x", "tools": [{"type": "function", "name": "y"}]},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "stream_options": {"reasoning_summary_delivery": "sequential"},
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0198",
    "text": {"verbosity": "low"},
    "client_metadata": {"x-codex-installation-id": "1"},
}
"""What Codex CLI sends, likewise."""


async def counted(front: Front) -> dict[str, float]:
    page = await front.metrics()
    found = re.findall(r'http_ignored_fields_total{field="(\w+)"} (\S+)', page)
    return {field: float(count) for field, count in found}


async def test_claude_codes_requests_are_answered(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    before = await counted(front)
    front.engine.script = list(outputs(tokenizer, "Hello."))
    async with long_context(front):
        answer = await http.post("/v1/messages?beta=true", json=CLAUDE_CODE)
    assert answer.status_code == 200, answer.text
    assert answer.text.count("event: message_stop") == 1
    assert answer.headers[HEADER] == "output_config.task_budget, tools.web_search_20250305"
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert "Plan mode is on." in prompt
    assert "Bash" in prompt
    assert "web_search" not in prompt
    after = await counted(front)
    for field in ("context_management", "unknown", "tools"):
        assert after[field] == before.get(field, 0) + 1


async def test_a_thread_is_not_continued(http: httpx.AsyncClient, front: Front) -> None:
    """Only the new turn would be there: the answer would be to something else."""
    thread = {"type": "continue", "previous_message_id": "msg_1"}
    answer = await http.post("/v1/messages", json={**CLAUDE_CODE, "thread": thread})
    assert answer.status_code == 400
    assert "send the whole conversation" in answer.json()["error"]["message"]
    assert not front.engine.submitted


async def test_codexs_requests_are_answered(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    before = await counted(front)
    front.engine.script = list(outputs(tokenizer, "Hello."))
    async with long_context(front):
        answer = await http.post("/v1/responses", json=CODEX)
    assert answer.status_code == 200, answer.text
    assert set(answer.headers[HEADER].split(", ")) == {
        "stream_options.reasoning_summary_delivery",
        "input[].internal_chat_message_metadata_passthrough",
        "tools.custom",
        "tools.web_search",
        "tools.namespace",
    }
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert "exec" in prompt
    assert "apply_patch" not in prompt
    after = await counted(front)
    assert after["client_metadata"] == before.get("client_metadata", 0) + 1
    assert after["tools"] == before.get("tools", 0) + 3


async def test_what_nobody_knows_is_named(front: Front, http: httpx.AsyncClient) -> None:
    plain = await post(http, CHAT)
    assert HEADER not in plain.headers
    turn = {"role": "user", "content": "Hi", "mood": "gay"}
    for given, names in (
        ({**CHAT, "frob": 1}, "frob"),
        ({**TEXT, "frob": {"a": [1]}}, "frob"),
        ({**CHAT, "messages": [turn, turn]}, "messages[].mood"),
        ({**CHAT, "frob": 1, "stream": True}, "frob"),
        ({**CHAT, "frob": None, "grob": [], "store": True}, None),
    ):
        answer = await post(http, given)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get(HEADER) == names
    assert front.engine.submitted[-1].prompt == front.engine.submitted[0].prompt


async def test_a_slip_is_refused(http: httpx.AsyncClient) -> None:
    for name, meant in (("temprature", "temperature"), ("max_token", "max_tokens")):
        answer = await post(http, CHAT, **{name: 1})
        assert answer.status_code == 400
        assert f"did you mean {meant!r}?" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "members",
    [
        {"response_format": {"type": "text", "frob": 1}},
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        {"messages": [{"role": "user", "content": "Hi", "audio": {"id": "1"}}]},
        {"suffix": "x"},
        {"system": "Be brief."},
    ],
)
async def test_what_would_change_the_answer_is_refused(
    http: httpx.AsyncClient, front: Front, members: dict[str, Any]
) -> None:
    answer = await post(http, {**CHAT, **members})
    assert answer.status_code == 400, answer.text
    assert not front.engine.submitted


async def test_the_flag_refuses_or_is_silent(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"openai_listen": "127.0.0.1:0", "unknown_fields": "refuse"}
    custom = {"type": "custom", "custom": {"name": "x"}}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        url = f"http://{front.addresses['openai']}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            for more, param in (
                ({"frob": 1}, "frob"),
                ({"tools": [WEATHER, custom]}, "tools[1].type"),
                ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
            ):
                answer = await post(http, CHAT, **more)
                assert (answer.status_code, error_of(answer)["param"]) == (400, param)
            assert (await post(http, CHAT, store=True)).status_code == 200
            body = {"token_ids": [1000], "sampling_params": {"max_tokens": 1}, "frob": 1}
            answer = await http.post("/inference/v1/generate", json=body)
            assert (answer.status_code, error_of(answer)["param"]) == (400, "frob")
            for path, body in (("/v1/messages", CLAUDE_CODE), ("/v1/responses", CODEX)):
                assert (await http.post(path, json=body)).status_code == 400


async def test_who_wants_to_hear_nothing_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*args: Any, **kwargs: Any) -> list[str]:
        raise AssertionError("nobody would be told what is near")

    monkeypatch.setattr("difflib.get_close_matches", compare)
    ignored = Ignored("ignore")
    parse_fields(ChatFields, {**CHAT, "frob": 1, "temprature": 1}, ignored)
    assert ignored.header == ""
    assert ignored.counts == {"unknown": 2}


async def test_few_names_are_compared_with_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes a millisecond each. These names look alike in the header."""
    compared: list[str] = []

    def compare(name: str, *args: Any, **kwargs: Any) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr("difflib.get_close_matches", compare)
    names = [chr(0x4E00 + at) for at in range(1000)]
    parse_fields(ChatFields, {**CHAT, **dict.fromkeys(names, 1)}, Ignored("warn"))
    assert len(compared) == MAX_NAMED


async def test_a_header_holds_few_short_harmless_names() -> None:
    """Whatever a caller makes up: it may be any text, of any length, and any number."""
    ignored = Ignored("warn")
    names = ["x\r\nset-cookie: a=1", "é" * 10, "n" * 10_000, *map(str, range(1000))]
    parse_fields(ChatFields, {**CHAT, **dict.fromkeys(names, 1)}, ignored)
    shown = ignored.header
    assert len(shown) < MAX_NAMED * 70
    assert shown.isascii()
    assert shown.startswith("x??set-cookie??a?1, ??????????, nnn")
    assert shown.endswith(f", and {len(names) - MAX_NAMED} more")
    assert set(ignored.counts) <= {*IGNORED, "unknown", "tools"}, "labels are bounded"
