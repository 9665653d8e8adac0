"""Requests on the wire, and responses as records."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import veneer_client
from google.protobuf.message import Message
from veneer_client import (
    AsyncClient,
    Chat,
    ChatMessage,
    Client,
    EvictMode,
    FinishReason,
    ServingStatus,
    Text,
    Tier,
    Tokens,
)
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.errors import (
    AdapterInvalid,
    AdapterNotFound,
    Cancelled,
    InternalError,
    InvalidField,
)
from veneer_registry.strict_json import show

from tests.refused import refused
from tests.unit.client.drivers import Driver
from tests.unit.client.fake_server import FakeServer


def test_exports() -> None:
    assert veneer_client.__all__ == sorted(veneer_client.__all__)
    for name in veneer_client.__all__:
        assert not getattr(veneer_client, name).__module__.startswith("veneer_proto"), name


def test_base_install_is_enough() -> None:
    """The client's own dependencies only: nothing of the server's, no torch."""
    code = "import sys, veneer_client.cli.main, veneer_client.local; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "veneer_client" in loaded, done.stderr
    heavy = {"torch", "transformers", "peft", "msgspec", "jinja2", "safetensors", "tokenizers"}
    assert not loaded & (heavy | {"uvloop", "prometheus_client", "psutil", "veneer_server"})


def test_an_answer_may_be_larger_than_what_grpc_takes_unasked(
    server: FakeServer, client: Driver
) -> None:
    """Many samples with log-probabilities are: gRPC takes 4 MiB."""
    text = "x" * (5 << 20)
    stop = inference_pb2.FINISH_REASON_STOP
    answer = inference_pb2.GenerateResponse(text=text, finish_reason=stop)
    server.on_generate = lambda request: answer
    assert client.generate(Text("hi")).text == text
    final = inference_pb2.GenerateStreamFinal(finish_reason=stop)
    server.pieces = [inference_pb2.GenerateStreamResponse(text=text, final=final)]
    chunks, _ = client.stream(Text("hi"))
    assert [chunk.text for chunk in chunks] == [text]


def test_what_a_plan_leaves_out_is_rank_16_on_all_modules(
    server: FakeServer, client: Driver
) -> None:
    client.plan()
    client.plan(rank=64)
    client.plan(modules=("q_proj",))
    requests = [request for _, request in server.calls]
    shapes = [(request.shape.rank, list(request.shape.modules)) for request in requests[1:]]
    assert not requests[0].HasField("shape")
    assert shapes == [(64, []), (16, ["q_proj"])]


@pytest.mark.parametrize("shape", [{"rank": 64}, {"modules": ["q_proj"]}], ids=str)
def test_a_plan_takes_one_shape(
    shape: dict[str, Any], server: FakeServer, client: Driver
) -> None:
    with refused(InvalidField, field="like"):
        client.plan(like="sql", **shape)
    assert server.calls == []


def test_a_period_of_usage_has_a_time_zone(server: FakeServer, client: Driver) -> None:
    start, end = (datetime(2026, month, 1, tzinfo=UTC) for month in (11, 12))
    report = client.usage("a", start=start, end=end)
    assert (report.start, report.end, report.tenants[0].tenant) == (start, end, "a")
    with refused(InvalidField, field="start"):
        client.usage(start=datetime(2026, 11, 1))
    assert len(server.calls) == 1


def _leaks(value: object) -> bool:
    if dataclasses.is_dataclass(value):
        return any(_leaks(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, tuple):
        return any(map(_leaks, value))
    return isinstance(value, Message) or "google" in type(value).__module__


def test_no_protobuf_leaves_the_client(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    server.add("chat")
    got = [
        client.generate(Text("x"), adapter="chat", logprobs=True),
        client.stream(Text("x"), adapter="chat"),
        client.push(adapter_folder, "other"),
        client.get("chat"),
        client.activate("chat"),
        client.evict("chat"),
        client.info(),
        client.delete("chat"),
    ]
    assert not any(_leaks(value) for value in got)
    assert _leaks((got[0], inference_pb2.Usage())), "the check itself must be able to fail"


# --------------------------------------------------------------------- generating


def test_unset_options_stay_unset(server: FakeServer, client: Driver) -> None:
    client.generate(Text("x"))
    (_, request), *_ = server.calls
    assert request == inference_pb2.GenerateRequest(
        prompt="x",
        stopping=inference_pb2.StoppingOptions(),
        output=inference_pb2.OutputOptions(),
        sampling=request.sampling if request.HasField("sampling") else None,
    )
    for field in ("temperature", "top_p", "top_k", "seed"):
        assert not request.sampling.HasField(field)
    assert not request.stopping.HasField("max_tokens")


def test_zero_is_not_unset(server: FakeServer, client: Driver) -> None:
    client.generate(
        Text("x"),
        adapter="chat",
        request_id="r",
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        seed=0,
        max_tokens=5,
        stop=("a", "b"),
        ignore_eos=True,
        logprobs=True,
        echo=True,
    )
    (_, request), *_ = server.calls
    assert request == inference_pb2.GenerateRequest(
        prompt="x",
        adapter="chat",
        request_id="r",
        sampling=inference_pb2.SamplingOptions(temperature=0.0, top_p=0.5, top_k=0, seed=0),
        stopping=inference_pb2.StoppingOptions(max_tokens=5, stop=["a", "b"], ignore_eos=True),
        output=inference_pb2.OutputOptions(logprobs=True, echo=True),
    )


def test_kinds_of_prompt(server: FakeServer, client: Driver) -> None:
    client.generate(Chat.user("hello", system="be brief"))
    client.generate(Tokens((1, 2, 3)))
    client.generate(Chat((ChatMessage("assistant", "a"),)))
    client.generate(Text(""))
    first, second, third, fourth = (request for _, request in server.calls)
    assert [(m.role, m.content) for m in first.messages.messages] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]
    assert list(second.token_ids.ids) == [1, 2, 3]
    assert third.messages.messages[0].role == "assistant"
    assert fourth.WhichOneof("input") == "prompt", "the server says what is wrong with it"


def test_answer(client: Driver) -> None:
    answer = client.generate(Text("hi"), adapter="chat")
    assert (answer.text, answer.token_ids) == ("chat>hi", (7, 8))
    assert answer.finish_reason is FinishReason.STOP
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    assert answer.logprobs[0].token_id == 7
    assert answer.provenance.short == "chat@" + "ab" * 6
    assert answer.provenance.tier is Tier.DISK
    assert answer.provenance.timings.adapter_load_s == pytest.approx(0.041)
    base = client.generate(Text("hi")).provenance
    assert (base.short, base.tier) == ("base", None)


def test_stream(client: Driver) -> None:
    chunks, end = client.stream(Text("hi"), max_tokens=3)
    assert [chunk.text for chunk in chunks] == ["0 ", "1 ", "2 "]
    assert [chunk.token_ids for chunk in chunks] == [(0,), (1,), (2,)]
    assert end.finish_reason is FinishReason.LENGTH
    assert end.usage.completion_tokens == 3


def test_final_before_the_end(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.generate_stream(Text("hi"))
        next(stream)
        # A wrong use of the client is a plain error, whose sentence is the fix.
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.final


def test_stream_without_an_end(server: FakeServer, client: Driver) -> None:
    server.omit_end = True
    with refused(InternalError, cause="stream_cut"):
        client.stream(Text("hi"))


def test_leaving_a_stream_cancels_it(server: FakeServer) -> None:
    server.hold = threading.Event()
    with Client(server.address) as client:
        with client.generate_stream(Text("hi")) as stream:
            next(stream)
            assert not server.cancelled.is_set()
        assert server.cancelled.wait(10)
        with pytest.raises(Cancelled):
            next(stream)


async def test_leaving_an_async_stream_cancels_it(server: FakeServer) -> None:
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        async with client.generate_stream(Text("hi")) as stream:
            await anext(stream)
            assert not server.cancelled.is_set()
        assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_cancelling_the_task_cancels_the_call(server: FakeServer) -> None:
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        first = asyncio.Event()

        async def read() -> None:
            async for _ in client.generate_stream(Text("hi")):
                first.set()

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 10)


# ----------------------------------------------------------------------- adapters


def test_list_goes_through_all_pages(server: FakeServer, client: Driver) -> None:
    names = [f"a{number:03}" for number in range(25)]
    for name in names:
        server.add(name)
    assert [adapter.name for adapter in client.all(page_size=10)] == names
    assert server.count("ListAdapters") == 3


def test_list_fetches_no_page_too_many(server: FakeServer) -> None:
    for number in range(30):
        server.add(f"a{number:02}")
    with Client(server.address) as client:
        listing = client.list(page_size=10)
        assert next(listing).name == "a00"
    assert server.count("ListAdapters") == 1


def test_list_filters(server: FakeServer, client: Driver) -> None:
    assert client.all(name_prefix="sq", tier=Tier.HOST, labels={"team": "x"}) == []
    (_, request), *_ = server.calls
    assert request == adapters_pb2.ListAdaptersRequest(
        page_size=100,
        name_prefix="sq",
        tier=inference_pb2.TIER_HOST,
        labels={"team": "x"},
    )


def test_adapter_record(server: FakeServer, client: Driver) -> None:
    server.add("chat")
    details = client.get("chat")
    adapter = details.adapter
    assert (adapter.name, adapter.rank, adapter.size, adapter.etag) == ("chat", 4, 200, "e1")
    assert adapter.tier is Tier.DISK
    assert adapter.created == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert adapter.last_used is None
    assert details.revisions == (adapter,)


def test_admin_requests(server: FakeServer, client: Driver) -> None:
    server.add("chat")
    assert client.activate("chat", tier=Tier.HOST, pin=True).tier is Tier.HOST
    assert client.evict("chat", mode=EvictMode.ABORT, unpin=True).freed_bytes == 200
    assert len(client.delete("chat", etag="e1")) == 1
    requests = [request for _, request in server.calls]
    assert requests == [
        adapters_pb2.ActivateAdapterRequest(
            name="chat", tier=inference_pb2.TIER_HOST, pin=True
        ),
        adapters_pb2.EvictAdapterRequest(
            name="chat", mode=adapters_pb2.EVICT_MODE_ABORT, unpin=True
        ),
        adapters_pb2.DeleteAdapterRequest(
            name="chat", etag="e1", mode=adapters_pb2.EVICT_MODE_DRAIN
        ),
    ]


def test_not_found_has_a_suggestion(client: Driver) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        client.get("chatt")
    assert caught.value.metadata["did_you_mean"] == "chat"


def test_info_and_health(client: Driver) -> None:
    info = client.info()
    assert (info.version, info.base_model.name, info.context_length) == (
        "9.9",
        "fake-base",
        128,
    )
    assert client.health() is ServingStatus.SERVING
    assert client.health("veneer.v1.AdapterService") is ServingStatus.NOT_SERVING


def test_a_registry_is_healthy_without_generating(server: FakeServer, client: Driver) -> None:
    server.registry = True
    assert client.health() is ServingStatus.SERVING
    client.wait_until_ready(10.0)
    server.ready = False
    assert client.health() is ServingStatus.NOT_SERVING


# ------------------------------------------------------------------------ pushing


def test_push_sends_the_bundle_in_chunks(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    seen: list[tuple[int, int]] = []
    pushed = client.push(
        adapter_folder,
        "chat",
        labels={"team": "x"},
        activate=True,
        allow_replace=True,
        progress=lambda sent, total: seen.append((sent, total)),
    )
    (upload,) = server.uploads
    spec = upload.spec
    assert (spec.name, dict(spec.labels)) == ("chat", {"team": "x"})
    assert (spec.activate, spec.allow_replace, spec.validate_only) == (True, True, False)
    assert {file.name for file in spec.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for file in spec.files:
        on_disk = (adapter_folder / file.name).read_bytes()
        parts = [chunk for chunk in upload.chunks if chunk.file == file.name]
        offset = 0
        for chunk in parts:
            assert chunk.offset == offset
            assert 0 < len(chunk.data) <= 1 << 20
            offset += len(chunk.data)
        assert b"".join(chunk.data for chunk in parts) == on_disk
        assert (file.size, file.sha256) == (
            len(on_disk),
            hashlib.sha256(on_disk).hexdigest(),
        )
    total = sum(file.size for file in spec.files)
    assert total > 2 << 20, "several chunks, or this tests little"
    assert [sent for sent, _ in seen] == sorted({sent for sent, _ in seen})
    assert seen[-1] == (total, total)
    assert pushed.published
    assert pushed.skipped == ("training_args.bin",)
    assert pushed.sent_bytes == total
    assert "server says" in pushed.warnings


def test_dry_run(server: FakeServer, client: Driver, adapter_folder: Path) -> None:
    assert not client.push(adapter_folder, "chat", validate_only=True).published
    assert server.uploads[0].spec.validate_only


def test_bad_folder_is_found_without_the_server(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    weights = adapter_folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterInvalid) as caught:
        client.push(adapter_folder, "chat")
    assert caught.value.metadata["file"] == "adapter_model.safetensors"
    with refused(AdapterInvalid, file=show(str(adapter_folder / "nope"))):
        client.push(adapter_folder / "nope", "chat")
    assert server.calls == []


def test_file_that_goes_away_while_it_is_sent(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    """It is open by then: what was hashed is sent."""
    weights = adapter_folder / "adapter_model.safetensors"
    content = weights.read_bytes()

    def lose(sent: int, total: int) -> None:
        weights.unlink(missing_ok=True)

    assert client.push(adapter_folder, "chat", progress=lose).published
    (upload,) = server.uploads
    assert b"".join(c.data for c in upload.chunks if c.file == weights.name) == content
