"""Generate and GenerateStream over a real socket: text, provenance, errors, cancellation."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from veneer_proto.v1 import adapters_pb2, server_pb2
from veneer_proto.v1 import inference_pb2 as pb
from veneer_registry.errors import NonFiniteOutput, QueueFull
from veneer_server.serving.checks import MAX_MESSAGES
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.rpc.fake_engine import CONTEXT, fake_tokens
from tests.unit.server.rpc.front_harness import (
    Front,
    failure,
    make_adapter,
    prompt,
    running,
    until,
)

NAN = float("nan")

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)


async def stream(front: Front, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
    return [message async for message in front.inference.GenerateStream(request)]


@pytest.mark.push
async def test_both_calls_give_the_same_text_and_tokens(
    front: Front, tokenizer: TextTokenizer
) -> None:
    request = prompt(
        sampling=pb.SamplingOptions(seed=7),
        stopping=pb.StoppingOptions(max_tokens=12),
        request_id="mine",
    )
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    expected = fake_tokens("", ids, 7, 12)

    whole = await front.inference.Generate(request)
    messages = await stream(front, request)

    assert list(whole.token_ids) == expected
    assert [t for m in messages for t in m.token_ids] == expected
    assert "".join(m.text for m in messages) == whole.text == tokenizer.decode(expected)
    assert {whole.request_id, *(m.request_id for m in messages)} == {"mine"}
    final = messages[-1].final
    assert whole.finish_reason == final.finish_reason == pb.FINISH_REASON_LENGTH
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (len(ids), 12)
    assert not any(m.HasField("final") for m in messages[:-1])
    assert final.provenance.base_model
    assert final.provenance.adapter == ""
    assert final.provenance.tier == pb.TIER_UNSPECIFIED


async def test_provenance_and_trailing_metadata_name_the_revision(
    front: Front, tmp_path: Path
) -> None:
    pushed = (await front.push(make_adapter(tmp_path / "a"), "style")).adapter
    call = front.inference.Generate(prompt(adapter="style"))
    where = (await call).provenance
    assert (where.adapter, where.revision) == ("style", pushed.revision)
    assert where.weights_digest == pushed.weights_digest
    assert where.tier == pb.TIER_DISK
    assert where.timings.adapter_load.nanos == 250_000_000
    assert where.timings.queue.nanos >= 125_000_000
    first, total = where.timings.time_to_first_token, where.timings.total
    assert 0 < first.nanos <= total.nanos
    trailing = dict(await call.trailing_metadata())
    assert trailing["veneer-weights-digest"] == pushed.weights_digest
    assert trailing["veneer-revision"] == pushed.revision
    assert trailing["veneer-adapter-tier"] == "disk"

    again = await front.inference.Generate(prompt(adapter=f"style@{pushed.revision[:12]}"))
    assert again.provenance.tier == pb.TIER_DEVICE
    source = front.engine.submitted[0].adapter
    assert source.weights_digest == pushed.weights_digest
    assert (Path(source.folder) / "adapter_model.safetensors").is_file()


async def test_an_unknown_adapter_is_named_with_a_suggestion(
    front: Front, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path / "a"), "style")
    failed = await failure(front.inference.Generate(prompt(adapter="stile")))
    assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert failed.metadata["did_you_mean"] == "style"
    assert failed.details["ResourceInfo"].resource_type == "veneer.v1.Adapter"
    assert front.engine.submitted == []


async def test_chats_use_the_base_template_and_an_adapters_own_wins(
    front: Front, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} >"
    await front.push(make_adapter(tmp_path / "a", template=template), "own")
    await front.push(make_adapter(tmp_path / "b"), "plain")
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="Hi")])
    few = pb.StoppingOptions(max_tokens=1)
    echo = pb.OutputOptions(echo=True)
    for adapter in ("own", "plain", ""):
        request = pb.GenerateRequest(adapter=adapter, messages=chat, stopping=few, output=echo)
        text = (await front.inference.Generate(request)).text
        if adapter == "own":
            assert text.startswith("[user] Hi >")
        else:
            assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" in text
    ids = tokenizer.encode("[user] Hi >", add_special_tokens=False)
    assert front.engine.submitted[0].prompt == ids


async def test_a_template_that_refuses_is_the_callers_error(
    front: Front, tmp_path: Path
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    await front.push(make_adapter(tmp_path / "a", template=template), "strict")
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="Hi")])
    failed = await failure(
        front.inference.Generate(pb.GenerateRequest(adapter="strict", messages=chat))
    )
    assert (failed.code, failed.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "TEMPLATE_FAILED",
    )
    assert "roles must alternate" in failed.message


async def test_echo_and_logprobs(front: Front, tokenizer: TextTokenizer) -> None:
    request = prompt(output=pb.OutputOptions(echo=True, logprobs=True))
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    whole = await front.inference.Generate(request)
    messages = await stream(front, request)
    assert whole.text.startswith("Hello there")
    assert "".join(m.text for m in messages).startswith("Hello there")
    assert [p.token_id for p in whole.prompt_logprobs] == ids[1:]
    assert [p.token_id for p in messages[0].prompt_logprobs] == ids[1:]
    assert [p.token_id for p in whole.logprobs] == list(whole.token_ids)
    assert all(p.logprob == -0.5 for p in whole.logprobs)


async def test_token_ids_go_in_as_they_are(front: Front, tokenizer: TextTokenizer) -> None:
    ids = [5, 900, 49151]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), stopping=pb.StoppingOptions(max_tokens=1)
    )
    await front.inference.Generate(request)
    assert front.engine.submitted[0].prompt == ids


async def test_unset_sampling_is_the_bases_and_zero_is_greedy(front: Front) -> None:
    info = await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    await front.inference.Generate(prompt())
    await front.inference.Generate(prompt())
    await front.inference.Generate(prompt(sampling=pb.SamplingOptions(temperature=0, seed=3)))
    first, second, greedy = (s.sampling for s in front.engine.submitted)
    assert (first.temperature, first.top_p, first.top_k) == (0.2, 0.9, 0)
    said = info.defaults
    assert (said.temperature, said.top_p, said.top_k, said.max_tokens) == (0.2, 0.9, 0, 512)
    assert first.seed != second.seed
    assert (greedy.temperature, greedy.seed) == (0.0, 3)


async def test_unset_max_tokens_goes_to_the_contexts_end_at_most(front: Front) -> None:
    assert CONTEXT < 512
    reply = await front.inference.Generate(pb.GenerateRequest(prompt="Hello there"))
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == CONTEXT


async def test_operators_set_what_unset_means(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {
        "default_max_tokens": "7",
        "default_temperature": "0.5",
        "default_top_p": "1",
        "openai_listen": "127.0.0.1:0",
    }
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        reply = await front.inference.Generate(pb.GenerateRequest(prompt="Hello there"))
        assert reply.usage.completion_tokens == 7
        sampling = front.engine.submitted[0].sampling
        assert (sampling.temperature, sampling.top_p) == (0.5, 1.0)
        info = await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        assert (info.defaults.max_tokens, info.defaults.temperature) == (7, 0.5)
        async with httpx.AsyncClient(trust_env=False) as http:
            asked = {"model": "smollm2-135m", "prompt": "Hello there"}
            url = f"http://{front.addresses['openai']}/v1"
            text = (await http.post(f"{url}/completions", json=asked)).json()
            assert text["usage"]["completion_tokens"] == 16, "as OpenAI and vLLM have it"
            asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]  # type: ignore[assignment]
            chat = (await http.post(f"{url}/chat/completions", json=asked)).json()
            assert chat["usage"]["completion_tokens"] == 7


async def test_context_too_long_says_the_numbers(front: Front) -> None:
    failed = await failure(front.inference.Generate(prompt("word " * 200)))
    assert (failed.code, failed.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONTEXT_TOO_LONG",
    )
    assert str(CONTEXT) in failed.message
    wide = prompt("Hello there", stopping=pb.StoppingOptions(max_tokens=CONTEXT))
    failed = await failure(front.inference.Generate(wide))
    assert failed.reason == "CONTEXT_TOO_LONG"
    largest = int(failed.metadata["largest"])
    assert f"at most {largest}" in failed.message
    wide.stopping.max_tokens = largest
    assert (await front.inference.Generate(wide)).usage.completion_tokens == largest


def _bad_requests() -> list[tuple[str, pb.GenerateRequest]]:
    sampling, stopping, output = pb.SamplingOptions, pb.StoppingOptions, pb.OutputOptions
    limit = pb.Constraint
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="", content="x")])
    roles = ("system", "usr")
    usr = pb.ChatInput(messages=[pb.ChatMessage(role=role, content="x") for role in roles])
    return [
        ("input", pb.GenerateRequest()),
        ("prompt", prompt("")),
        ("messages", pb.GenerateRequest(messages=pb.ChatInput())),
        ("messages[0].role", pb.GenerateRequest(messages=chat)),
        ("messages[1].role", pb.GenerateRequest(messages=usr)),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[49152]))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1]))),
        ("request_id", prompt(request_id="a b")),
        ("request_id", prompt(request_id="x" * 129)),
        ("sampling.temperature", prompt(sampling=sampling(temperature=-0.1))),
        ("sampling.temperature", prompt(sampling=sampling(temperature=1e9))),
        ("sampling.temperature", prompt(sampling=sampling(temperature=float("nan")))),
        ("sampling.temperature", prompt(sampling=sampling(temperature=float("inf")))),
        ("sampling.top_p", prompt(sampling=sampling(top_p=0))),
        ("sampling.top_p", prompt(sampling=sampling(top_p=1.01))),
        ("sampling.top_p", prompt(sampling=sampling(top_p=float("nan")))),
        ("stopping.max_tokens", prompt(stopping=stopping(max_tokens=0))),
        ("stopping.stop", prompt(stopping=stopping(stop=["x"] * 17))),
        ("stopping.stop[1]", prompt(stopping=stopping(stop=["x", ""]))),
        ("stopping.stop[0]", prompt(stopping=stopping(stop=["x" * 257]))),
        ("stopping.stop_token_ids", prompt(stopping=stopping(stop_token_ids=range(65)))),
        ("stopping.stop_token_ids", prompt(stopping=stopping(stop_token_ids=[49152]))),
        ("sampling.min_p", prompt(sampling=sampling(min_p=-0.1))),
        ("sampling.min_p", prompt(sampling=sampling(min_p=1.1))),
        ("sampling.repetition_penalty", prompt(sampling=sampling(repetition_penalty=0))),
        ("sampling.repetition_penalty", prompt(sampling=sampling(repetition_penalty=101))),
        ("sampling.presence_penalty", prompt(sampling=sampling(presence_penalty=2.1))),
        ("sampling.frequency_penalty", prompt(sampling=sampling(frequency_penalty=NAN))),
        ("sampling.logit_bias", prompt(sampling=sampling(logit_bias={5: 101.0}))),
        ("sampling.logit_bias", prompt(sampling=sampling(logit_bias={5: NAN}))),
        ("sampling.logit_bias", prompt(sampling=sampling(logit_bias={49152: 1.0}))),
        (
            "sampling.logit_bias",
            prompt(sampling=sampling(logit_bias=dict.fromkeys(range(1025), 1.0))),
        ),
        ("output.top_logprobs", prompt(output=output(logprobs=True, top_logprobs=21))),
        ("output.top_logprobs", prompt(output=output(top_logprobs=1))),
        ("output.n", prompt(output=output(n=0))),
        ("output.n", prompt(output=output(n=17))),
        ("constraint", prompt(constraint=limit())),
        ("constraint.json_schema", prompt(constraint=limit(json_schema=""))),
        ("constraint.json_schema", prompt(constraint=limit(json_schema=" " * 32769))),
        ("constraint.choice", prompt(constraint=limit(choice=pb.Choices()))),
        ("constraint.choice", prompt(constraint=limit(choice=pb.Choices(texts=["a", ""])))),
        (
            "constraint.choice",
            prompt(constraint=limit(choice=pb.Choices(texts=["x"] * 1001))),
        ),
    ]


async def test_each_bad_field_is_named_and_nothing_is_submitted(front: Front) -> None:
    for field, request in _bad_requests():
        for call in (front.inference.Generate, front.inference.GenerateStream):
            failed = await failure(call(request))
            assert failed.code is grpc.StatusCode.INVALID_ARGUMENT, field
            assert (failed.reason, failed.metadata["field"]) == ("INVALID_FIELD", field)
            violation = failed.details["BadRequest"].field_violations[0]
            assert violation.field == field
    assert front.engine.submitted == []


async def test_names_that_are_not_adapters(front: Front) -> None:
    for name in ("../etc", "A", "a" * 64, "x@", "x@zz", "@", "a/b", "a@" + "0" * 65):
        failed = await failure(front.inference.Generate(prompt(adapter=name)))
        assert failed.reason in ("INVALID_FIELD", "ADAPTER_NOT_FOUND"), name


async def test_fields_of_later_versions_are_refused_with_a_sentence(front: Front) -> None:
    request = prompt(adapters=[pb.AdapterWeight(adapter="a", weight=1)])
    failed = await failure(front.inference.Generate(request))
    assert failed.code is grpc.StatusCode.UNIMPLEMENTED
    assert failed.metadata["field"] in failed.message


async def test_a_stop_string_ends_the_sequence_and_is_not_shown(
    front: Front, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("one two<|stop|>three four", add_special_tokens=False)
    front.engine.script = [SequenceOutput(1, [token]) for token in ids]
    request = prompt(stopping=pb.StoppingOptions(stop=["<|stop|>"], max_tokens=40))
    messages = await stream(front, request)
    assert "".join(m.text for m in messages) == "one two"
    assert messages[-1].final.finish_reason == pb.FINISH_REASON_STOP
    assert front.engine.cancelled == 1
    whole = await front.inference.Generate(request)
    assert whole.text == "one two"
    assert len(whole.token_ids) < len(ids)


async def test_characters_split_over_tokens_come_whole(
    front: Front, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("é 🚀 日本", add_special_tokens=False)
    outputs = [SequenceOutput(1, [token]) for token in ids[:-1]]
    front.engine.script = [*outputs, SequenceOutput(1, [ids[-1]], finish="stop")]
    messages = await stream(front, prompt())
    assert "".join(m.text for m in messages) == "é 🚀 日本"
    assert not any("\ufffd" in m.text for m in messages)


async def test_outputs_of_several_tokens_are_one_message(
    front: Front, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("a b c d", add_special_tokens=False)
    front.engine.script = [
        SequenceOutput(1, ids[:3]),
        SequenceOutput(1, ids[3:], finish="stop"),
    ]
    messages = await stream(front, prompt())
    assert [list(m.token_ids) for m in messages] == [ids[:3], ids[3:]]


async def test_an_error_of_one_row_ends_that_call_only(front: Front) -> None:
    front.engine.script = [
        SequenceOutput(1, [1000]),
        NonFiniteOutput("not finite: lower the temperature"),
    ]
    call = front.inference.GenerateStream(prompt())
    assert list((await anext(aiter(call))).token_ids) == [1000]
    failed = await failure(call)
    assert (failed.code, failed.reason) == (grpc.StatusCode.ABORTED, "NON_FINITE_OUTPUT")


async def test_a_bug_is_told_by_its_request_id_only(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    front.engine.script = [SequenceOutput(1, ["secret"])]  # type: ignore[list-item]
    failed = await failure(front.inference.Generate(prompt(request_id="abc")))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert failed.metadata == {"request_id": "abc"}
    assert "secret" not in failed.message
    assert any(record.exc_info for record in caplog.records)


async def test_cancelling_stops_the_work_and_gives_the_lease_back(
    front: Front, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path / "a"), "style")
    front.engine.pace = asyncio.Semaphore(1)
    request = prompt(adapter="style", stopping=pb.StoppingOptions(max_tokens=20))
    call = front.inference.GenerateStream(request)
    await anext(aiter(call))
    listed = await front.adapters.GetAdapter(_get("style"))
    assert listed.adapter.leases == 1
    call.cancel()
    await until(lambda: front.engine.in_flight == 0)
    assert front.engine.cancelled == 1
    listed = await front.adapters.GetAdapter(_get("style"))
    assert listed.adapter.leases == 0


async def test_a_deadline_ends_the_call(front: Front) -> None:
    front.engine.pace = asyncio.Semaphore(1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.inference.Generate(prompt(), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: front.engine.in_flight == 0)


async def test_the_engine_is_told_when_the_deadline_is_and_not_how_long_it_leaves(
    front: Front,
) -> None:
    """The message may wait: `StepLoop` reads the same clock when it takes it."""
    began = time.monotonic()
    await front.inference.Generate(prompt(output=pb.OutputOptions(n=2)), timeout=30)
    await front.inference.Generate(prompt())
    first, second, without = (request.deadline for request in front.engine.submitted)
    assert first is not None
    # gRPC rounds what is left of a timeout on its way.
    assert began + 29 < first <= time.monotonic() + 30.1
    assert second is None, "the first sample's first token has come by then"
    assert without is None


async def test_a_deadline_shorter_than_a_step_is_refused(front: Front) -> None:
    front.engine.step(seconds=1000.0)
    front.engine.in_flight = 1  # others run: what counts is how long steps take of late
    try:
        failed = await failure(front.inference.Generate(prompt(), timeout=20))
    finally:
        front.engine.in_flight = 0
        for _ in range(200):
            front.engine.step(seconds=0.0)
    assert failed.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert failed.reason == "DEADLINE_TOO_SHORT"
    assert front.engine.submitted == []


async def test_a_full_queue_says_when_to_retry(front: Front) -> None:
    front.engine.script = [QueueFull("the queue is full: retry", retry_after_s=1.5)]
    failed = await failure(front.inference.Generate(prompt()))
    assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failed.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 1.5
    assert failed.trailing["grpc-retry-pushback-ms"] == "1500"


async def test_a_replaced_or_deleted_adapter_does_not_disturb_running_requests(
    front: Front, tmp_path: Path
) -> None:
    old = (await front.push(make_adapter(tmp_path / "a", seed=1), "style")).adapter
    front.engine.pace = asyncio.Semaphore(1)
    request = prompt(adapter="style", stopping=pb.StoppingOptions(max_tokens=8))
    running = front.inference.GenerateStream(request)
    await anext(aiter(running))
    kept = Path(front.engine.submitted[0].adapter.folder).is_dir
    new = await front.push(make_adapter(tmp_path / "b", seed=2), "style", allow_replace=True)
    assert new.replaced
    await front.adapters.DeleteAdapter(_delete("style"))
    assert kept()
    for _ in range(20):
        front.engine.pace.release()
    rest = [message async for message in running]
    assert rest[-1].final.provenance.revision == old.revision
    await until(lambda: not kept())


def _get(name: str) -> Any:
    return adapters_pb2.GetAdapterRequest(name=name)


def _delete(name: str) -> Any:
    return adapters_pb2.DeleteAdapterRequest(name=name)


async def test_log_probabilities_name_their_tokens(
    front: Front, tokenizer: TextTokenizer
) -> None:
    """By text, a fragment of a character by its bytes; in both calls and in the prompt."""
    fragment = next(
        t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) == b"\xf0\x9f"
    )
    (the,) = tokenizer.encode(" the", add_special_tokens=False)
    front.engine.script = [
        SequenceOutput(
            1,
            [fragment],
            logprobs=[-1.0],
            top_logprobs=[[(the, -0.5), (2, -0.75), (fragment, -1.0)]],
            finish="length",
        )
    ]
    request = prompt(output=pb.OutputOptions(logprobs=True, top_logprobs=3))
    [whole] = (await front.inference.Generate(request)).logprobs
    [streamed] = [entry for m in await stream(front, request) for entry in m.logprobs]
    assert whole == streamed
    assert (whole.token_id, whole.token) == (fragment, "bytes:\\xf0\\x9f")
    assert [top.token for top in whole.top] == [" the", "<|im_end|>", "bytes:\\xf0\\x9f"]

    front.engine.script = None
    request.output.echo = True
    answer = await front.inference.Generate(request)
    assert "".join(entry.token for entry in answer.prompt_logprobs) == " there"
    assert all(entry.token for entry in (*answer.logprobs, *answer.prompt_logprobs))


# ------------------------------------------------------------------ before any work


async def test_more_token_ids_than_fit_are_not_looked_at(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("they were decoded")

    monkeypatch.setattr(TextTokenizer, "decode", never)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[10**6] * 1_000_000))
    request.output.echo = True
    refused = await failure(front.inference.Generate(request))
    assert refused.reason == "CONTEXT_TOO_LONG"
    assert refused.metadata["prompt_tokens"] == "1000000"
    assert front.engine.submitted == []


async def test_a_prompt_of_too_many_bytes_is_not_tokenized(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(TextTokenizer, "encode", never)
    long = pb.ChatMessage(role="user", content="x" * 4_000_000)
    for request in (
        prompt("word " * 800_000),
        pb.GenerateRequest(messages=pb.ChatInput(messages=[long])),
    ):
        refused = await failure(front.inference.Generate(request))
        assert refused.reason == "CONTEXT_TOO_LONG"
        assert int(refused.metadata["largest_bytes"]) < 10_000


async def test_more_messages_than_a_chat_may_have(front: Front) -> None:
    messages = [pb.ChatMessage(role="user")] * (MAX_MESSAGES + 1)
    request = pb.GenerateRequest(messages=pb.ChatInput(messages=messages))
    refused = await failure(front.inference.Generate(request))
    assert (refused.reason, refused.metadata["field"]) == ("INVALID_FIELD", "messages")
