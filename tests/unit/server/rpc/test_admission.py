"""What is refused before the engine hears of it, and what a refusal must not hold."""

from __future__ import annotations

from pathlib import Path

import grpc
import msgspec
import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")


def chat(text: str, **fields: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content=text)]
    return pb.GenerateRequest(messages=pb.ChatInput(messages=messages), **fields)


async def test_text_whose_tokens_the_model_does_not_have_is_refused(
    front: Front, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may know more tokens than the model has rows for, such as [PAD]."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %} Mama"
    await front.push(make_adapter(tmp_path / "a", template=template), "own")
    tokenizer = TextTokenizer.from_folder(base_folder)
    [beyond] = tokenizer.encode(" Mama", add_special_tokens=False)
    smaller = msgspec.structs.replace(front.engine.info, vocab_size=beyond)
    monkeypatch.setattr(front.engine, "info", smaller)
    for field, request in (
        ("prompt", prompt("Hello Mama")),
        ("prompt", prompt("Hello " * 2000 + " Mama")),
        ("messages", chat("Hello Mama")),
        ("messages", chat("Hello", adapter="own")),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, beyond]))),
    ):
        failed = await failure(front.inference.Generate(request))
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
        assert (failed.reason, failed.metadata["field"]) == ("INVALID_FIELD", field)
        assert f"ends at {beyond - 1}" in failed.message
        assert field == "token_ids" or "Mama" in failed.message
    assert front.engine.submitted == []
    assert len((await front.inference.Generate(prompt())).token_ids) == 4
