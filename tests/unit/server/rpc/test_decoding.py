"""A message's entries are counted before parsing; malformed ones are refused in one line."""

from __future__ import annotations

import logging
import random
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_server.rpc.transport.receiving import (
    COUNTED_FROM,
    MAX_FIELDS,
    MAX_STREAM_FIELDS,
    count_fields,
    count_numbers,
    decoder,
    last_value,
    values,
)
from veneer_server.serving.uploads import MAX_FILES, MAX_LABELS

from tests.hostile.wire import length_delimited, tag, varint
from tests.unit.server.rpc.front_harness import Front, failure

MESSAGES = b"\x0a\x00"  # an empty ChatMessage within a ChatInput


def walked(message: Any) -> int:
    """Fields as the parsed message has them: each entry of a list is one."""
    count = 0
    for field, value in message.ListFields():
        entries = value if field.is_repeated and field.message_type else [value]
        if (
            field.is_repeated
            and field.message_type
            and field.message_type.GetOptions().map_entry
        ):
            count += 3 * len(value)  # an entry, its key and its value
            continue
        for entry in entries:
            count += 1
            if field.message_type is not None:
                count += walked(entry)
    return count


def test_packed_numbers_are_counted_without_parsing() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        count = rng.randrange(100_000 if rng.random() < 0.1 else 50)
        ids = [rng.randrange(1 << rng.randrange(1, 33)) for _ in range(count)]
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids))
        data = request.SerializeToString()
        assert sum(map(count_numbers, values(last_value(data, 5), 1))) == count
    cut = length_delimited(5, b"abc") + length_delimited(5, b"de") + b"\x2a\x7f"
    assert values(cut, 5) == [b"abc", b"de", b""]


def test_fields_are_counted_as_the_parser_finds_them() -> None:
    rng = random.Random(20)
    for _ in range(50):
        request = inference_pb2.GenerateRequest(adapter="a" * rng.randrange(300))
        for _ in range(rng.randrange(20)):
            request.messages.messages.add(role="user", content="x" * rng.randrange(500))
        request.stopping.stop_token_ids.extend(range(rng.randrange(1, 300)))
        request.sampling.seed = rng.getrandbits(64)
        request.sampling.temperature = 1.0
        request.sampling.logit_bias.update(dict.fromkeys(range(1, rng.randrange(2, 9)), 1.0))
        request.constraint.choice.texts.append("a")
        data = request.SerializeToString()
        assert count_fields(data, request.DESCRIPTOR) == walked(request)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 40,
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        tag(1000, 3) * 100,
        b"\x22" + varint(1 << 62),
    ],
)
def test_what_is_malformed_is_left_to_the_parser(data: bytes) -> None:
    assert count_fields(data, inference_pb2.GenerateRequest.DESCRIPTOR) <= 100


def test_a_flood_of_fields_is_not_parsed() -> None:
    def parse(data: bytes) -> Any:
        raise AssertionError("it was parsed")

    class Owner:
        DESCRIPTOR = inference_pb2.GenerateRequest.DESCRIPTOR

    flood = length_delimited(4, MESSAGES * (2 << 20))
    decode = decoder(type("Bound", (), {"__self__": Owner, "__call__": parse})())
    assert decode(flood).reason == "INVALID_FIELD"


def test_a_message_that_is_not_counted_cannot_have_too_many_fields() -> None:
    assert COUNTED_FROM // 2 <= MAX_FIELDS


def test_the_largest_announcement_of_an_upload_has_few_enough_fields() -> None:
    spec = adapters_pb2.UploadSpec(
        name="a", etag="1", activate=True, allow_replace=True, resume=True, validate_only=True
    )
    for n in range(MAX_FILES):
        spec.files.add(name=f"{n}", size=n + 1, sha256="0" * 64)
    spec.labels.update({f"{n}": "a" for n in range(MAX_LABELS)})
    data = adapters_pb2.UploadAdapterRequest(spec=spec).SerializeToString()
    assert count_fields(data, adapters_pb2.UploadAdapterRequest.DESCRIPTOR) < MAX_STREAM_FIELDS


@pytest.mark.asyncio(loop_scope="module")
class TestOverTheWire:
    """Real sockets, fake engine."""

    async def test_malformed_messages_are_counted_as_the_callers(
        self, front: Front, caplog: pytest.LogCaptureFixture
    ) -> None:
        generate = front.channel.unary_unary("/veneer.v1.InferenceService/Generate")
        watch = front.channel.unary_stream("/veneer.v1.AdapterService/WatchAdapters")
        before = await counted(front)
        with caplog.at_level(logging.INFO):
            for call in (
                generate(b"\xff" * 3000),
                generate(b"\x22\x02\xed\xa0"),
                watch(b"\x09"),
            ):
                refused = await failure(call)
                assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
                assert refused.reason == "MALFORMED_MESSAGE"
                assert len(refused.message) < 300
        assert await counted(front) == before + 3
        scraped = await front.metrics()
        assert 'grpc_code="INVALID_ARGUMENT",grpc_method="Generate"' in scraped
        lines = [record.getMessage() for record in caplog.records]
        assert lines == ["call refused"] * 3
        assert not any(record.exc_info for record in caplog.records)

    async def test_a_malformed_message_in_the_middle_of_an_upload(self, front: Front) -> None:
        spec = adapters_pb2.UploadAdapterRequest(spec=adapters_pb2.UploadSpec(name="half"))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            spec.spec.files.add(name=name, size=8, sha256="0" * 64)
        upload = front.channel.stream_unary("/veneer.v1.AdapterService/UploadAdapter")
        refused = await failure(upload(iter([spec.SerializeToString(), b"\xff\xff"])))
        assert refused.reason == "MALFORMED_MESSAGE"

    @pytest.mark.parametrize("fields", [2_000, 32_700], ids=str)
    async def test_a_chunk_of_many_fields_is_refused(self, front: Front, fields: int) -> None:
        """It was an empty chunk, and counting its fields held the event loop for 52 ms."""
        spec = adapters_pb2.UploadAdapterRequest(spec=adapters_pb2.UploadSpec(name="many"))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            spec.spec.files.add(name=name, size=8, sha256="0" * 64)
        chunk = length_delimited(2, b"") + b"\xf8\x01\x01" * fields
        upload = front.channel.stream_unary("/veneer.v1.AdapterService/UploadAdapter")
        refused = await failure(upload(iter([spec.SerializeToString(), chunk])))
        assert refused.reason == "INVALID_FIELD"
        assert refused.metadata["field"] == "UploadAdapterRequest"

    async def test_a_reflection_request_of_many_fields_is_refused(self, front: Front) -> None:
        name = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        ask = front.channel.stream_stream(name)
        refused = await failure(ask(iter([b"\xf8\x01\x01" * 32_700])))
        assert refused.reason == "INVALID_FIELD"

    @pytest.mark.parametrize(
        "method",
        [
            "grpc.health.v1.Health/Check",
            "grpc.health.v1.Health/Watch",
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ],
    )
    async def test_health_and_reflection_refuse_them_too(
        self, front: Front, caplog: pytest.LogCaptureFixture, method: str
    ) -> None:
        before = await counted(front)
        if method.endswith("Info"):
            call = front.channel.stream_stream(f"/{method}")(iter([b"\x0a\x02\xff\xff"]))
        elif method.endswith("Watch"):
            call = front.channel.unary_stream(f"/{method}")(b"\x0a\x02\xff\xff")
        else:
            call = front.channel.unary_unary(f"/{method}")(b"\x0a\x02\xff\xff")
        refused = await failure(call)
        assert refused.reason == "MALFORMED_MESSAGE"
        assert await counted(front) == before + 1
        assert not any(record.exc_info for record in caplog.records)

    async def test_more_messages_than_a_chat_may_have(self, front: Front) -> None:
        request = length_delimited(4, MESSAGES * 800_000)
        generate = front.channel.unary_unary("/veneer.v1.InferenceService/Generate")
        assert (await failure(generate(request))).reason == "INVALID_FIELD"


async def counted(front: Front) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(await front.metrics())
        for sample in family.samples
        if sample.name == "veneer_request_failures_total"
        and sample.labels["reason"] == "MALFORMED_MESSAGE"
    )
