"""What is refused before the engine hears of it, and what a refusal must not hold."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_registry.errors import InvalidField
from veneer_server.engine.messages import Constraint
from veneer_server.rpc import generation
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, prompt, until

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


class Checks:
    """Checks of constraints that begin, and end when they are told to."""

    def __init__(self) -> None:
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.go_on = threading.Event()
        self.error: InvalidField | None = None

    def check(self, constraint: Constraint) -> None:
        self.begun.put(constraint.text)
        assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checks]:
    made = Checks()
    monkeypatch.setattr(generation, "check_constraint", made.check)
    yield made
    made.go_on.set()


def constrained(text: str) -> pb.GenerateRequest:
    return prompt(constraint=pb.Constraint(regex=text))


async def test_requests_that_wait_for_a_check_are_in_the_queue(
    front: Front, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else any number of them could wait there, with prompt and lease, and none be told."""
    monkeypatch.setattr(front.engine, "capacity", 2)
    calls = [front.inference.Generate(constrained(text)) for text in "ab"]
    await asyncio.to_thread(checks.begun.get, timeout=30)
    await until(lambda: front.engine.taken == 2)
    for refused in (constrained("c"), prompt()):
        failed = await failure(front.inference.Generate(refused))
        assert (failed.code, failed.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
        )
    checks.go_on.set()
    for call in calls:
        assert len((await call).token_ids) == 4
    await until(lambda: front.engine.taken == 0)


async def test_places_come_back_from_requests_that_are_never_submitted(
    front: Front, checks: Checks, tmp_path: Path
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
        assert front.engine.taken == 0, reason
    # Cancelled while their constraint is checked, and while they wait for that.
    calls = [front.inference.Generate(constrained(text)) for text in "ab"]
    await asyncio.to_thread(checks.begun.get, timeout=30)
    await until(lambda: front.engine.taken == 2)
    for call in calls:
        call.cancel()
    # The one that waits leaves at once; the other, cancelled before it on the same
    # connection, has been told too, and leaves when its check ends.
    await until(lambda: front.engine.taken == 1)
    checks.go_on.set()
    await until(lambda: front.engine.taken == 0)
    checks.error = InvalidField("constraint is bad: simplify it")
    assert (await failure(front.inference.Generate(constrained("c")))).reason == "INVALID_FIELD"
    assert front.engine.taken == 0
    assert front.engine.submitted == []
