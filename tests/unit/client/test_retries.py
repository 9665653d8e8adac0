"""A refused call is retried if the server says when, it is safe, and it can help."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from veneer_client import RetryPolicy, Text, VeneerError
from veneer_client.failures import Attempts
from veneer_registry.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidField,
    QueueFull,
    ServerUnreachable,
)

from tests.refused import refused
from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer, Refusal

FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_s=0.001)
RESTARTING = Refusal(grpc.StatusCode.UNAVAILABLE, "dead", "ENGINE_FAILED", retry_s=0.001)


def test_repeats_until_it_works(server: FakeServer, client: Driver) -> None:
    server.refusals.extend([FULL, RESTARTING])
    assert client.generate(Text("hi"), adapter="a").text == "a>hi"
    assert server.count("Generate") == 3


def test_gives_up_after_its_attempts(server: FakeServer, client: Driver) -> None:
    server.refusals.extend([FULL] * 99)
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


def test_wrong_name_is_found_without_the_server(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    with refused(InvalidField, field="name"):
        client.push(adapter_folder, "../chat")
    assert server.calls == []


GONE = Refusal(grpc.StatusCode.UNAVAILABLE, "the socket closed")
DRAINING = Refusal(grpc.StatusCode.UNAVAILABLE, "stopping", "DRAINING", retry_s=0.001)


def test_a_server_that_said_it_drains_is_waited_for(server: FakeServer, client: Driver) -> None:
    server.refusals.extend([DRAINING, GONE, GONE])
    assert client.generate(Text("hi"), adapter="a").text == "a>hi"
    assert server.count("Generate") == 4


def test_a_server_that_broke_down_is_not(server: FakeServer, client: Driver) -> None:
    server.refusals.extend([FULL, GONE])
    with pytest.raises(ServerUnreachable):
        client.generate(Text("hi"))
    assert server.count("Generate") == 2


def test_the_timeout_covers_all_attempts(server: FakeServer, client: Driver) -> None:
    """A wait that would outlast it is not begun; the refusal says why it failed."""
    late = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_s=3.0)
    server.refusals.append(late)
    with pytest.raises(QueueFull):
        client.generate(Text("hi"), timeout_s=2.0)
    server.refusals.append(late)
    with pytest.raises(QueueFull):
        client.info(timeout_s=2.0)
    assert len(server.calls) == 2


def test_a_deadline_is_told_as_one(server: FakeServer, client: Driver) -> None:
    server.hold = threading.Event()
    with refused(DeadlineExceeded, cause="client_deadline"):
        client.generate(Text("hi"), timeout_s=0.2)
    with refused(DeadlineExceeded, cause="client_deadline"):
        client.stream(Text("hi"), timeout_s=0.2)


def test_waits_are_what_the_server_said_and_grow() -> None:
    """Never sooner than told, longer each time, never past the longest."""
    policy = RetryPolicy(attempts=9, longest_wait_s=5.0, growth=2.0)
    attempts = Attempts(policy, repeatable=True, timeout_s=None)
    error = QueueFull("full", retry_after_s=1.0)
    waits = [attempts.wait_s(error) for _ in range(9)]
    for wait, least in zip(waits, (1, 2, 4, 5, 5, 5, 5, 5), strict=False):
        assert wait is not None
        assert least <= wait <= min(1.25 * least, policy.longest_wait_s)
    assert waits[-1] is None
    attempts.succeeded()
    again = attempts.wait_s(error)
    assert again is not None
    assert 1 <= again <= 1.25


def test_half_a_minute_of_patience_by_default() -> None:
    """What an engine restart takes on a busy machine."""
    attempts = Attempts(RetryPolicy(), repeatable=True, timeout_s=None)
    error = EngineFailed("dead", retry_after_s=2.0)
    waits = [wait for wait in (attempts.wait_s(error) for _ in range(20)) if wait]
    assert 25 <= sum(waits) <= 45
