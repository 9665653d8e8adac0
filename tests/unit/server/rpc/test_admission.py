"""What is refused before it reaches the engine, and that a refusal holds no resources."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import msgspec
import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.queues.fairness import Sender
from veneer_server.text.prompts import Prompt, Prompts, Room
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.garbage import collected
from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, prompt, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def chat(text: str, **fields: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content=text)]
    return pb.GenerateRequest(messages=pb.ChatInput(messages=messages), **fields)


@pytest.mark.push
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
        ("prompt", prompt("Hello" + " " * 2100 + " Mama")),
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


class Gate:
    """Prompts that are being prepared, until they are let through."""

    def __init__(self) -> None:
        self.begun = 0
        self.opened = asyncio.Event()

    def close(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare = Prompts.from_text

        async def from_text(prompts: Prompts, text: str, room: Room, *more: Sender) -> Prompt:
            self.begun += 1
            await self.opened.wait()
            return await prepare(prompts, text, room, *more)

        monkeypatch.setattr(Prompts, "from_text", from_text)


async def test_requests_that_are_being_prepared_are_in_the_queue(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else any number of them could wait there, with prompt and lease, and none be told."""
    gate = Gate()
    gate.close(monkeypatch)
    monkeypatch.setattr(front.engine.places, "capacity", 2)
    calls = [front.inference.Generate(prompt(text)) for text in "ab"]
    await until(lambda: gate.begun == 2)
    assert front.engine.places.taken == 2
    for refused in (prompt("c"), prompt()):
        failed = await failure(front.inference.Generate(refused))
        assert (failed.code, failed.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
        )
    gate.opened.set()
    for call in calls:
        assert len((await call).token_ids) == 4
    await until(lambda: front.engine.places.taken == 0)


async def test_places_come_back_from_requests_that_are_never_submitted(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('no') }}"
    await front.push(make_adapter(tmp_path / "a", template=template), "strict")
    for reason, request in (
        ("TEMPLATE_FAILED", chat("Hello", adapter="strict")),
        ("CONTEXT_TOO_LONG", prompt("word " * 200)),
        ("INVALID_FIELD", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[49152]))),
        ("INVALID_FIELD", prompt(sampling=pb.SamplingOptions(logit_bias={49152: 1.0}))),
        ("ADAPTER_NOT_FOUND", prompt(adapter="none")),
    ):
        assert (await failure(front.inference.Generate(request))).reason == reason
        assert front.engine.places.taken == 0, reason
    gate = Gate()
    gate.close(monkeypatch)
    calls = [front.inference.Generate(prompt(text)) for text in "ab"]
    await until(lambda: gate.begun == 2)
    assert front.engine.places.taken == 2
    for call in calls:
        call.cancel()
    await until(lambda: front.engine.places.taken == 0)
    assert front.engine.submitted == []


async def test_a_constraint_that_is_too_large_is_refused(front: Front) -> None:
    for constraint, field in (
        (pb.Constraint(regex="a" * 40_000), "constraint.regex"),
        (pb.Constraint(choice=pb.Choices(texts=["b" * 40_000])), "constraint.choice"),
    ):
        failed = await failure(front.inference.Generate(prompt(constraint=constraint)))
        assert (failed.reason, failed.metadata["field"]) == ("INVALID_FIELD", field)
    assert front.engine.submitted == []


async def test_nothing_keeps_the_prompt_of_a_refused_call(front: Front) -> None:
    """Else it stays until a full collection, which 4 MB texts do not bring about."""
    with collected() as garbage:
        for reason, request in (
            ("CONTEXT_TOO_LONG", prompt("word " * 40_000)),  # by its bytes
            ("CONTEXT_TOO_LONG", prompt("0 " * 3000)),  # by its tokens
            ("ADAPTER_NOT_FOUND", prompt("0 " * 3000, adapter="none")),
            ("CONTEXT_TOO_LONG", chat("0 " * 3000)),
        ):
            assert (await failure(front.inference.Generate(request))).reason == reason
            assert (await failure(front.inference.GenerateStream(request))).reason == reason
    assert garbage.large(5000) == []


async def test_too_many_token_ids_are_refused_before_they_are_parsed(
    front: Front,
) -> None:
    """4 MB hold four million of them, and take 200 MB as Python numbers."""
    few = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300] * 10))
    many = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300] * 400_000))
    calls = [front.inference.Generate(many), front.inference.GenerateStream(many)]
    for call in calls:
        failed = await failure(call)
        assert failed.reason == "CONTEXT_TOO_LONG"
        assert failed.metadata["prompt_tokens"] == "400000"
    assert (await front.inference.Generate(few)).token_ids
