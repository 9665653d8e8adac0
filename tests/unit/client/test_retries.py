"""A refused call is repeated when the server says when, it is safe, and it helps."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from veneer_client import RetryPolicy, Text, VeneerError
from veneer_registry.errors import EngineFailed, InvalidField, QueueFull

from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer, Refusal

FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_s=0.001)
RESTARTING = Refusal(grpc.StatusCode.UNAVAILABLE, "dead", "ENGINE_FAILED", retry_s=0.001)


def test_repeats_until_it_works(server: FakeServer, client: Driver) -> None:
    server.refusals.extend([FULL, RESTARTING])
    assert client.generate(Text("hi"), adapter="a").text == "a>hi"
    assert server.count("Generate") == 3


def test_gives_up_after_its_attempts(server: FakeServer, client: Driver) -> None:
    server.refusals.extend([FULL] * 9)
    with pytest.raises(QueueFull):
        client.generate(Text("hi"))
    assert server.count("Generate") == RetryPolicy().attempts


def test_retries_can_be_turned_off(kind: str, server: FakeServer) -> None:
    server.refusals.append(FULL)
    with (
        driver(kind, server.address, retry=RetryPolicy(attempts=1)) as client,
        pytest.raises(QueueFull),
    ):
        client.generate(Text("hi"))
    assert server.count("Generate") == 1


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL"),
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_s=99.0),
        Refusal(grpc.StatusCode.INVALID_ARGUMENT, "bad", "INVALID_FIELD", retry_s=0.001),
        Refusal(grpc.StatusCode.UNAVAILABLE, "the socket closed"),
    ],
    ids=["no delay given", "delay too long", "wrong for ever", "nobody there"],
)
def test_final_at_once(refusal: Refusal, server: FakeServer, client: Driver) -> None:
    server.refusals.append(refusal)
    with pytest.raises(VeneerError):
        client.generate(Text("hi"))
    assert server.count("Generate") == 1


def test_delete_is_never_repeated(server: FakeServer, client: Driver) -> None:
    server.add("chat")
    server.refusals.append(RESTARTING)
    with pytest.raises(EngineFailed):
        client.delete("chat")
    assert server.count("DeleteAdapter") == 1


def test_stream_is_repeated_before_its_first_piece(server: FakeServer, client: Driver) -> None:
    server.refusals.append(FULL)
    chunks, _ = client.stream(Text("hi"), max_tokens=2)
    assert [chunk.text for chunk in chunks] == ["0 ", "1 "]
    assert server.count("GenerateStream") == 2


def test_stream_is_not_repeated_after_it(server: FakeServer, client: Driver) -> None:
    server.break_after = RESTARTING
    with pytest.raises(EngineFailed):
        client.stream(Text("hi"))
    assert server.count("GenerateStream") == 1


def test_upload_is_sent_again_from_the_start(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    server.refusals.append(RESTARTING)
    client.push(adapter_folder, "chat")
    assert server.count("UploadAdapter") == 2
    (upload,) = server.uploads
    assert upload.chunks[0].offset == 0
    assert sum(len(c.data) for c in upload.chunks) == sum(f.size for f in upload.spec.files)


def test_wrong_name_is_found_without_the_server(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    with pytest.raises(InvalidField, match="name"):
        client.push(adapter_folder, "../chat")
    assert server.calls == []
