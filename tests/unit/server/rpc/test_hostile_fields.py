"""Every field of every call with hostile values: always a one-line client error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import status_pb2

from tests.hostile.wire import Case, cases, good, methods
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

METHODS = {f"{m.containing_service.name}.{m.name}": m for m in methods()}
OUR_FAULT = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
SECONDS = 20.0


def noise(records: list[logging.LogRecord]) -> list[str]:
    """Lines of a log that an operator would have to read: errors, traces, and events that
    take several lines."""
    formatter = logging.Formatter()
    return [
        formatter.format(record)[:500]
        for record in records
        if record.levelno >= logging.ERROR or record.exc_info or "\n" in record.getMessage()
    ]


async def outcome(front: Front, method: MethodDescriptor, messages: list[bytes]) -> str:
    """The status of a call; a refusal must say why in a way that programs can read."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    channel = front.channel
    try:
        if method.client_streaming:
            await channel.stream_unary(path)(_each(messages), timeout=SECONDS)
        elif method.server_streaming:
            stream = channel.unary_stream(path)(messages[0], timeout=SECONDS)
            async for _ in stream:
                if method.name == "WatchAdapters":  # has no end of its own
                    stream.cancel()
                    return "OK"
        else:
            await channel.unary_unary(path)(messages[0], timeout=SECONDS)
    except grpc.aio.AioRpcError as error:
        trailing: dict[str, Any] = dict(error.trailing_metadata() or ())
        packed = trailing.get("grpc-status-details-bin")
        said = status_pb2.Status.FromString(packed) if packed else None
        if said is None or not said.details or len(said.message) > 1000:
            return f"{error.code().name} without a reason: {error.details()}"
        if "\n" in said.message:
            return f"{error.code().name} in several lines: {said.message}"
        return error.code().name
    return "OK"


async def _each(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
        await asyncio.sleep(0)


@pytest.mark.push
@pytest.mark.parametrize("name", sorted(METHODS))
async def test_no_field_of_a_call_is_our_fault(
    name: str, front: Front, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = METHODS[name]
    await front.push(make_adapter(tmp_path / "a"), "style")
    first = good(method, "style").SerializeToString()
    tried: list[tuple[Case, list[bytes]]] = [
        (case, [case.data]) for case in cases(method.input_type, first)
    ]
    tried += [(case, [case.data]) for case in cases(method.input_type)]
    if method.client_streaming:
        tried += [(case, [first, case.data]) for case in cases(method.input_type)]
    if method.name == "SelfTest":  # without names it starts a real one
        tried = [pair for pair in tried if pair[1][0].startswith(first)]
    wrong: list[str] = []
    with caplog.at_level(logging.INFO):
        for case, messages in tried:
            caplog.clear()
            status = await outcome(front, method, messages)
            if status.partition(" ")[0] in OUR_FAULT or " " in status:
                wrong.append(f"{case.name}: {status}")
            wrong += [f"{case.name}: log: {line}" for line in noise(caplog.records)]
    assert not wrong, f"{len(wrong)} of {len(tried)}:\n" + "\n".join(wrong[:40])
