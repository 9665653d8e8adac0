"""What a model thought is apart from its answer, over HTTP and gRPC, streamed and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.openai.kit import CHAT, TEXT, events, ok
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

TAGGED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
"""Like Qwen3's: the model opens the tag, unless it is told not to think."""

OPENED = "{{ messages[-1].content }}<assistant><think>\n"
"""Like DeepSeek-R1's."""

MISTRAL = "Begin with [THINK]a draft[/THINK].{{ messages[-1].content }}"
"""As of Magistral: the model opens the tag because it is told to."""

THOUGHT, ANSWER = "\nTwo and two… 😀\n", "\n\nFour."


async def push(front: Front, folder: Path, template: str) -> dict[str, Any]:
    await front.push(make_adapter(folder, template=template), "thinker")
    return {**CHAT, "model": "thinker", "max_tokens": 40}


def says(front: Front, tokenizer: TextTokenizer, text: str) -> list[int]:
    """Let the engine say a text, a token at a time."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    front.engine.script = [
        SequenceOutput(
            1, [token], logprobs=[-0.5], finish=None if at + 1 < len(ids) else "stop"
        )
        for at, token in enumerate(ids)
    ]
    return ids


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TAGGED, f"<think>{THOUGHT}</think>{ANSWER}"),
        (OPENED, f"{THOUGHT}</think>{ANSWER}"),
        (MISTRAL, f"[THINK]{THOUGHT}[/THINK]{ANSWER}"),
    ],
)
async def test_thinking_is_apart_from_the_answer(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    template: str,
    text: str,
) -> None:
    given = await push(front, tmp_path, template)
    ids = says(front, tokenizer, text)
    whole = await ok(http, given, logprobs=True, return_token_ids=True)
    [choice] = whole["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["message"]["reasoning_content"] == THOUGHT
    assert choice["message"]["reasoning"] == THOUGHT
    assert choice["token_ids"] == ids
    assert len(choice["logprobs"]["content"]) == len(ids)
    assert whole["usage"]["completion_tokens"] == len(ids)

    chunks = await events(http, given, logprobs=True, return_token_ids=True)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("reasoning", "") for delta in deltas) == THOUGHT
    assert [token for choice in choices for token in choice.get("token_ids", [])] == ids
    scores = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert sum(len(each["content"]) for each in scores) == len(ids)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]

    request = pb.GenerateRequest(
        adapter="thinker",
        messages=pb.ChatInput(messages=[pb.ChatMessage(role="user", content="Hi")]),
        stopping=pb.StoppingOptions(max_tokens=40),
    )
    answer = await front.inference.Generate(request)
    assert (answer.text, answer.reasoning, list(answer.token_ids)) == (ANSWER, THOUGHT, ids)
    counted = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert answer.usage.reasoning_tokens == counted > 0
    messages = [message async for message in front.inference.GenerateStream(request)]
    assert "".join(message.text for message in messages) == ANSWER
    assert "".join(message.reasoning for message in messages) == THOUGHT
    assert messages[-1].final.usage == answer.usage

    hidden = await ok(http, given, include_reasoning=False)
    assert hidden["choices"][0]["message"] == {
        "role": "assistant",
        "content": ANSWER,
        "refusal": None,
    }


async def test_who_does_not_think_answers_as_ever(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    given = await push(front, tmp_path, TAGGED)
    text = f"<think>{THOUGHT}</think>{ANSWER}"
    says(front, tokenizer, text)
    # A template without the tag, a completion, and a constraint, which the whole text matches.
    plain = await ok(http, CHAT)
    assert plain["choices"][0]["message"]["content"] == text
    completion = await ok(http, {**TEXT, "model": "thinker"})
    assert completion["choices"][0]["text"] == text
    constrained = await ok(http, given, structured_outputs={"regex": "(?s).*"})
    assert constrained["choices"][0]["message"]["content"] == text
    says(front, tokenizer, ANSWER)
    brief = await ok(http, given, reasoning_effort="none", return_token_ids=True)
    assert brief["choices"][0]["message"]["content"] == ANSWER
    assert "reasoning_content" not in brief["choices"][0]["message"]
    assert tokenizer.decode(brief["prompt_token_ids"]).endswith("<think></think>")


async def test_thinking_goes_back_into_the_template(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    given = await push(front, tmp_path, TAGGED)
    expected = "<user>Hi</><assistant><think>hm</think>Yes</><user>Why?</><assistant>"
    for name in ("reasoning", "reasoning_content"):
        given["messages"] = [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": "Yes",
                name: "hm",
                "tool_calls": [],
                "audio": None,
            },
            {"role": "user", "content": "Why?"},
        ]
        await ok(http, given, max_tokens=1)
        assert tokenizer.decode(front.engine.submitted[-1].prompt) == expected
    messages = [
        pb.ChatMessage(role="user", content="Hi"),
        pb.ChatMessage(role="assistant", content="Yes", reasoning="hm"),
    ]
    request = pb.GenerateRequest(
        adapter="thinker",
        messages=pb.ChatInput(messages=messages),
        template=pb.TemplateOptions(continue_final_message=True, kwargs='{"x": 1}'),
        stopping=pb.StoppingOptions(max_tokens=1),
    )
    await front.inference.Generate(request)
    assert (
        tokenizer.decode(front.engine.submitted[-1].prompt) == expected.split("</><user>W")[0]
    )
